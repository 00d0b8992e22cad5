"""How the parts of a model are called for people, and where its ``config.json`` says what: all without torch.

Reports, progress lines and model cards know a model by the paths of its modules and by ``model_type`` in its
``config.json``. What these mean, a family says in ``carsam/models/<family>/names.py`` by a subclass of :class:`Names`,
which is found by itself; a package from outside defines one beside its family.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from carsam.plugins import named_subclasses

REST = "other quantized layers"
_NONE: Mapping[str, str] = MappingProxyType({})


class Names:
    """Names of one family's modules. This class itself serves models of a family that is not known.

    Attributes:
        family: Name of the family's folder.
        title: For people: ``SAM``.
        model_types: What ``model_type`` in ``config.json`` may say.
        model_class: The class of its models, for people.
        library: The package that has that class.
        processors: transformers' processor of images and prompts, and the one of images, for
            ``preprocessor_config.json``.
        encoder_config: Key of the image encoder's settings in ``config.json``.
        decoder: Module path that all of the decoder lies under.
        blocks: Module path whose numbered children are shown as one group each.
        row: What such a group is called in a table: ``block`` 12.
        prefixes: Beginnings of module paths, with what is shown in their place.
        regions: Beginnings of module paths, with the region of the network that they are, in execution order. Of
            several that fit, the longest counts.
        order: Names of modules; of two siblings, the one that runs first stands first.
        brief: Words for a chart in the place of a module's name.
        silent: Names that such words leave out.
        headings: Words for a layer over its column in a table.
        registers: Modules of transformers, each with the module of carsam that is to be imported right after it
            (:mod:`carsam.pack.registration`).
        configuration: Where transformers has no such model: module and class of its configuration. Importing that
            module registers configuration and model with transformers' automatic classes.
    """

    family: ClassVar[str] = ""
    title: ClassVar[str] = "a model"
    model_types: ClassVar[tuple[str, ...]] = ()
    model_class: ClassVar[str] = "AutoModel"
    library: ClassVar[str] = "transformers"
    processors: ClassVar[tuple[str, str]] = ("", "")
    encoder_config: ClassVar[str] = ""
    decoder: ClassVar[str] = ""
    blocks: ClassVar[str] = ""
    row: ClassVar[str] = "block"
    prefixes: ClassVar[Mapping[str, str]] = _NONE
    regions: ClassVar[Mapping[str, str]] = _NONE
    order: ClassVar[tuple[str, ...]] = ("query", "key", "value", "probs", "input", "weight")
    brief: ClassVar[Mapping[str, str]] = _NONE
    silent: ClassVar[frozenset[str]] = frozenset({"layers", "blocks"})
    headings: ClassVar[Mapping[str, str]] = _NONE
    registers: ClassVar[Mapping[str, str]] = _NONE
    configuration: ClassVar[str] = ""

    def short(self, name: Any) -> str:
        """``encoder.layers.3`` for ``vision_encoder.layers.3``; also within a sentence."""
        name = str(name)
        for prefix, replacement in self.prefixes.items():
            name = name.replace(prefix, replacement)
        return name

    def compact(self, name: Any) -> str:
        """A name in words short enough for a chart on a phone: ``decoder 0 tok→img out_proj input``."""
        words = [part for part in self.short(name).split(".") if part not in self.silent]
        return " ".join(self.brief.get(word, word) for word in words)

    def row_label(self, group: str) -> str:
        """A group in about ten characters, for the first column of a table: ``block 12``, ``0 tok→img``."""
        words = self.compact(group)
        if self._block(group) == group:
            return f"{self.row} {group.rpartition('.')[2]}"
        first, _, rest = words.partition(" ")
        return rest if rest and f"{first}." in self.prefixes.values() else words

    def region(self, path: str) -> str:
        """The region of the network that a layer or group lies in."""
        fitting = [prefix for prefix in self.regions if path.startswith(prefix)]
        return self.regions[max(fitting, key=len)] if fitting else REST

    @property
    def region_titles(self) -> tuple[str, ...]:
        """All regions in execution order; last, the one of what is not known."""
        return (*dict.fromkeys(self.regions.values()), REST)

    def group(self, site: str) -> str:
        """The group of a layer or activation site: a block of the encoder, an attention or MLP of the decoder."""
        path = site.removesuffix(".input")
        return self._block(path) or path.rpartition(".")[0]

    def _block(self, path: str) -> str:
        found = re.match(rf"{re.escape(self.blocks)}\.\d+(?=\.|$)", path) if self.blocks else None
        return found[0] if found else ""

    def in_decoder(self, path: str) -> bool:
        """Whether a module path lies in the decoder."""
        return bool(self.decoder) and (path == self.decoder or path.startswith(self.decoder + "."))

    def execution_key(self, path: str) -> tuple[Any, ...]:
        """Sort key of a module path or site. Unknown names come last among their siblings, numbers as numbers."""
        key: list[tuple[int, int, str]] = []
        for part in path.split("."):
            if part.isdecimal():
                key.append((0, int(part), ""))
            elif part in self.order:
                key.append((1, self.order.index(part), ""))
            else:
                key.append((2, 0, part))
        return tuple(key)

    def encoder_settings(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The image encoder's settings in a ``config.json``; empty where there are none."""
        settings = config.get(self.encoder_config) if self.encoder_config else None
        return settings if isinstance(settings, Mapping) else {}


def names_of_type(model_type: object) -> Names:
    """The names of a family, by ``model_type`` of a ``config.json``; :class:`Names` itself where none is known."""
    # Packages from outside are asked last: theirs may take seconds to import.
    for plugins in (False, True):
        for names in all_names(plugins=plugins):
            if model_type in names.model_types:
                return names
    return Names()


def all_names(*, plugins: bool = True) -> list[Names]:
    """The names of every family; with ``plugins`` also of families from other packages, which are imported then."""
    what = "family's table of names"
    found = named_subclasses(Names, "family", __package__, what=what, module="names", plugins=plugins)
    return [cls() for cls in found.values()]

"""Errors meant for people.

Every message says what is wrong, where, and how to fix it. The command line prints them without a traceback;
anything else that escapes is a defect of carsam and keeps its traceback.
"""


class CarsamError(ValueError):
    """Base of all errors that the user can fix."""


class ConfigError(CarsamError):
    """A setting is unknown or out of range."""


class CheckpointError(CarsamError):
    """A model or packed folder is missing, damaged, or not what it claims to be."""


class DataError(CarsamError):
    """Images, annotations or prompts are missing or unusable."""


class DeviceError(CarsamError):
    """The requested device is not available."""

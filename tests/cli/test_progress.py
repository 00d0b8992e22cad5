"""Progress: the time left, stages, kept units, quiet."""

import pytest

import carsam
from carsam.commands.progress import Reporter
from carsam.run.course import Course
from carsam.run.progress import KEPT, PlannedUnit


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


UNITS = [PlannedUnit(f"encoder {i}", "encoder", 50) for i in range(3)] + [PlannedUnit("decoder", "decoder", 150)]


def walk(course, clock, index, seconds_before, seconds_a_step):
    """Goes through a unit."""
    course.unit(index, 0)
    clock.now += seconds_before
    for step in range(1, UNITS[index].steps + 1):
        clock.now += seconds_a_step
        course.unit(index, step)


def test_time_left_follows_what_was_measured():
    clock = Clock()
    course = Course(clock)
    course.stage("preparing", 0, 0)
    clock.now += 10
    course.stage("units", 0, 4)
    course.expect(UNITS)
    course.unit(0, 0)
    assert course.left is None
    walk(course, clock, 0, 10, 0.2)
    # 20 s for 100 (50 steps, and what else a unit costs): two more of these, and a decoder of 200.
    course.unit(1, 0)
    assert course.left == pytest.approx(20 + 20 + 40, rel=0.05)
    assert course.share == pytest.approx(30 / 112, rel=0.05)
    walk(course, clock, 1, 10, 0.2)
    walk(course, clock, 2, 10, 0.2)
    # The decoder is slower than the encoder: after some of its steps, that counts.
    course.unit(3, 0)
    before = course.share
    for step in range(1, 51):
        clock.now += 1
        course.unit(3, step)
    assert course.left == pytest.approx(100, rel=0.1)
    assert course.share >= before
    course.stage("packing", 0, 0)
    clock.now += 1
    course.finish()
    assert course.seconds == pytest.approx({"preparing": 10, "units": 110, "packing": 1})


@pytest.mark.parametrize("each", [1, 3])
def test_choices_that_take_as_long_as_the_units_show_in_the_share(each):
    clock, shares = Clock(), []
    course = Course(clock)
    course.stage("preparing", 0, 0)
    course.stage("choices", 0, 10)
    for done in range(1, 11):
        clock.now += 10
        course.stage("choices", done, 10)
        shares.append(course.share)
    assert shares == sorted(shares) and shares[-1] == pytest.approx(0.25, abs=0.01)
    units = [PlannedUnit(f"encoder {i}", "encoder", 0) for i in range(10)]
    course.expect(units)
    course.stage("units", 0, 10)
    for index in range(10):
        course.unit(index, 0)
        shares.append(course.share)
        clock.now += 10 * each
    assert shares == sorted(shares)
    # After the first unit it is known how long they take.
    assert shares[11] == pytest.approx((100 + 10 * each) / (100 + 100 * each), abs=0.02)


def test_kept_units_do_not_count_as_quick_ones():
    clock = Clock()
    course = Course(clock)
    course.stage("units", 0, 4)
    course.expect(UNITS)
    course.kept(0)
    clock.now += 0.1
    walk(course, clock, 1, 10, 0.2)
    course.unit(2, 0)
    assert course.left == pytest.approx(20 + 40, rel=0.05)


def test_lines_of_a_run(capsys):
    with Reporter("quantizing nano") as reporter:
        run = reporter.run
        run.stage("proposals", 0, 2)
        run.stage("proposals", 2, 2)
        run.stage("units", 0, 2)
        run.expect(
            [
                PlannedUnit("vision_encoder.layers.0", "encoder", 50, "encoder.layers.0"),
                PlannedUnit("mask_decoder.transformer.layers.0", "decoder", 50, "decoder.layers.0"),
            ]
        )
        run(0, 2, "vision_encoder.layers.0" + KEPT, 0, 0)
        run(1, 2, "mask_decoder.transformer.layers.0", 0, 50)
        run(1, 2, "mask_decoder.transformer.layers.0", 50, 50)
        run.stage("packing", 0, 0)
        reporter.summarise()
    lines = [line.partition("] ")[2] or line for line in capsys.readouterr().err.splitlines()]
    assert lines[:5] == [
        "quantizing nano",
        "proposals  0/2",
        "unit 1/2  encoder.layers.0 (kept)",
        "unit 2/2  decoder.layers.0  step 0/50",
        "packing",
    ]
    assert [line.split()[0] for line in lines[5:]] == ["preparing", "proposals", "units", "packing", "total"]


def test_quiet_says_nothing(capsys):
    with Reporter("a title", quiet=True) as reporter:
        reporter.run.stage("packing", 0, 0)
        reporter.images(1, 2)
        reporter.summarise()
    assert capsys.readouterr() == ("", "")


def test_from_python_and_resumed(nano, small_set, quick_config, tmp_path, capsys):
    out = tmp_path / "q"

    def stop(unit, n_units, name, step, n_steps):
        if unit == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carsam.quantize(nano, small_set, quick_config, out=out, progress=stop)
    carsam.quantize(nano, small_set, quick_config, out=out, resume=True, progress=True)
    lines = capsys.readouterr().err
    assert "unit 2/14  encoder.layers.1 (kept)" in lines
    assert "unit 3/14  encoder.layers.2  step 0/2" in lines
    assert [line.split()[0] for line in lines.splitlines()[-2:]] == ["verifying", "total"]

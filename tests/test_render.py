"""Pictures and texts of an episode, and the trace that they show."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib
import numpy as np
import numpy.typing as npt
import pytest
import torch
from gymnasium.wrappers import TimeLimit

from esper_env import EsperVectorEnv, Op, Stage
from esper_env.envs.history import History
from esper_env.envs.render import HEIGHT, WIDTH, describe, draw
from tests.builders import (
    CONV_LIGHT,
    FULL_ALPHA,
    ID,
    SMALL,
    action,
    assert_same,
    make,
    make_single,
    play,
    poison,
    waits,
)

SHAPE = (HEIGHT, WIDTH, 3)
ORANGE_RED = (0xD5, 0x5E, 0x00)
GREEN = (0x00, 0x9E, 0x73)
"""Colors of a rollback and of FOSSILIZED."""
NAMES = ("norm", "conv")


def fabricate(num_slots: int = 2, steps: int = 4, episode_steps: int = 6) -> History:
    """Member 0: conv germinates in slot 0 in step 1, blends, and fossilizes in step 4.

    Member 1 only waits.
    """
    trace = History(2, num_slots, episode_steps)
    stages = (0, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED)
    ops = (Op.WAIT, Op.GERMINATE, Op.ADVANCE, Op.WAIT, Op.FOSSILIZE)
    for step in range(steps + 1):
        stage = np.zeros((2, num_slots), dtype=np.int64)
        stage[0, 0] = stages[step]
        accuracy = np.array([0.1 + 0.2 * step, 0.1])
        has_grown = np.array([step > 0, False])
        is_blending = stage == Stage.BLENDING
        info = {
            "stage": stage,
            "alpha": np.where(stage > Stage.BLENDING, 1.0, np.where(is_blending, 0.5, 0)),
            "blueprint": np.where(stage > 0, 1, -1),
            "accuracy": accuracy,
            "committed_accuracy": accuracy - 0.05 * has_grown,
            "score": accuracy - 0.01 * has_grown,
            "committed_score": accuracy - 0.06 * has_grown,
            "parameters": 50 * has_grown,
            "op": np.array([ops[step], Op.WAIT]),
            "rolled_back": np.zeros(2, dtype=bool),
        }
        trace.record(np.arange(2), info, np.zeros(2, dtype=np.int64))
    return trace


def show(trace: History, member: int = 0, **options: Any) -> npt.NDArray[np.uint8]:
    return draw(trace, member, blueprints=NAMES, host_parameters=100, **options)


def lanes(envs: EsperVectorEnv, member: int = 0) -> list[str]:
    """Return the lanes of a member's text, without the blanks of steps to come."""
    frames = envs.render()
    assert frames is not None
    text = frames[member]
    assert isinstance(text, str)
    return [line.split("|")[1].rstrip() for line in text.splitlines()[1:]]


def has_color(picture: npt.NDArray[np.uint8], color: tuple[int, int, int]) -> bool:
    """Whether a color occurs below the legend."""
    return bool((picture[92:] == np.array(color)).all(axis=2).any())


@pytest.mark.parametrize(("num_slots", "steps"), [(1, 0), (2, 4), (5, 4), (20, 4)])
def test_every_picture_has_the_same_shape(num_slots: int, steps: int) -> None:
    picture = show(fabricate(num_slots, steps), instance="train-3")
    assert picture.shape == SHAPE
    assert picture.dtype == np.uint8
    assert picture.flags.c_contiguous


def test_the_picture_changes_with_the_lifecycle() -> None:
    """One picture per stage; green only where the seed is fossilized."""
    pictures = [show(fabricate(steps=steps)) for steps in range(5)]
    assert len({picture.tobytes() for picture in pictures}) == 5
    assert [has_color(picture, GREEN) for picture in pictures] == [False] * 4 + [True]


def test_the_same_trace_gives_the_same_picture_whoever_was_drawn_before() -> None:
    trace = fabricate()
    first, other, again, other_again = (show(trace, member) for member in (0, 1, 0, 1))
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(again, first)
    np.testing.assert_array_equal(other_again, other)


def test_axes_and_legend_stay_where_they_are_during_an_episode() -> None:
    """Left margin and legend, while the score stays above 0 and the size below 2 hosts."""
    pictures = [show(fabricate(steps=steps)) for steps in range(5)]
    for picture in pictures[1:]:
        np.testing.assert_array_equal(picture[35:, :70], pictures[0][35:, :70])
        np.testing.assert_array_equal(picture[35:85], pictures[0][35:85])


def test_axes_widen_for_low_scores_and_large_networks() -> None:
    margins = []
    for floor, parameters in ((0.0, 50), (-0.3, 50), (0.0, 1000)):
        trace = fabricate()
        trace.rows.committed_score[0, 2], trace.rows.parameters[0, 2] = floor, parameters
        picture = show(trace)
        margins.append((picture[430:, :70].tobytes(), picture[430:, 905:].tobytes()))
    (left, right), (lower, _), (same, larger) = margins
    assert lower != left
    assert (same == left, larger == right) == (True, False)


def test_names_are_shortened_or_left_out_where_the_next_seed_leaves_no_room() -> None:
    """Of 61 columns and 108 characters a lane, 2 steps have room for 3 and 4 steps for 7."""
    pictures = {}
    for gap in (2, 4, 20):
        trace = fabricate(episode_steps=60)
        trace.length[0], trace.rows.op[0, 1 + gap] = 2 + gap, Op.GERMINATE
        trace.rows.blueprint[0, 1 + gap] = -1
        pictures[gap] = draw(trace, 0, blueprints=["", "a_long_name"], host_parameters=100)
    is_dark = {gap: (picture[92:106] < 128).all(axis=2) for gap, picture in pictures.items()}
    ends = {gap: dark.any(axis=0).nonzero()[0].max(initial=0) for gap, dark in is_dark.items()}
    assert ends[2] == 0
    left, step_width = 72, 826 / 61
    assert left + 1 * step_width < ends[4] < left + (1 + 4) * step_width < ends[20]


def test_drawing_leaves_global_state_alone() -> None:
    state, torch_state = np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    # Reading "backend" would make matplotlib choose one.
    names = matplotlib.rcParams.keys() - {"backend"}
    settings = {name: matplotlib.rcParams[name] for name in names}
    show(fabricate())
    np.testing.assert_array_equal(np.random.get_state()[1], state[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert {name: matplotlib.rcParams[name] for name in names} == settings


def test_matplotlib_is_imported_only_to_draw_and_pyplot_never() -> None:
    code = (
        "import sys\n"
        "from tests.builders import make\n"
        "def loaded(): return [n in sys.modules for n in ('matplotlib', 'matplotlib.pyplot')]\n"
        "envs = make(1, render_mode='rgb_array')\n"
        "envs.reset(seed=0)\n"
        "assert loaded() == [False, False], loaded()\n"
        "envs.render()\n"
        "assert loaded() == [True, False], loaded()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_the_text_of_a_small_episode() -> None:
    """Accuracy 0.1 + 0.2 * 3 = 0.7; the columns of steps 4 to 6 are still blank."""
    text = describe(fabricate(steps=3), 0, blueprints=NAMES, host_parameters=100)
    assert text == (
        "env step 3/6  accuracy 0.700 (committed 0.650)  score 0.690 (committed 0.640)"
        "  parameters 100 + 50  WAIT\n"
        "slot 0 |.tbh   | HOLDING    1.00 conv\n"
        "slot 1 |....   | DORMANT    0.00 -"
    )
    text = describe(fabricate(), 0, blueprints=NAMES, host_parameters=100, instance="test-7")
    assert text.splitlines()[0].endswith("  FOSSILIZE slot 0  instance test-7")
    assert text.splitlines()[1] == "slot 0 |.tbhF  | FOSSILIZED 1.00 conv"


def test_the_text_of_a_scripted_episode() -> None:
    """Germinated and training in the step itself; 2 steps later it blends for 3 ticks, then holds.

    The third tick lands on alpha 1, so the step that it belongs to ends in HOLDING.
    """
    env = make_single(render_mode="ansi")
    env.reset(seed=0)
    env.step(action(Op.GERMINATE, 0, blueprint=CONV_LIGHT, alpha_target=FULL_ALPHA))
    for op in (Op.WAIT, Op.ADVANCE, Op.WAIT, Op.WAIT, Op.FOSSILIZE, Op.WAIT):
        env.step(action(op))
    *_, info = env.step(action(Op.GERMINATE, 1, blueprint=CONV_LIGHT))
    expected = (
        f"env step  8/12  accuracy {info['accuracy']:.3f} "
        f"(committed {info['committed_accuracy']:.3f})"
        f"  score {info['score']:.3f} (committed {info['committed_score']:.3f})"
        f"  parameters 438 + {info['parameters']}  GERMINATE slot 1\n"
        "slot 0 |.ttbbhFFF    | FOSSILIZED 1.00 conv_light\n"
        "slot 1 |........t    | TRAINING   0.00 conv_light"
    )
    assert env.render() == expected


def test_a_parked_seed_has_a_letter_of_its_own() -> None:
    """Grafted in service; parked, in service and parked again, each for an env step and more."""
    env = make_single(render_mode="ansi", graft=True, parking=True)
    env.reset(seed=0)
    env.step(action(Op.GERMINATE, 1, blueprint=CONV_LIGHT))
    for target in (0, FULL_ALPHA + 1, 0):  # With parking, target 0.0 comes first.
        env.step(action(Op.SET_ALPHA, 1, alpha_target=target))
    env.step(action(Op.WAIT))
    text = env.render()
    assert isinstance(text, str)
    assert text.splitlines()[2].startswith("slot 1 |.hphpp ")


def test_the_trace_begins_anew_with_every_episode() -> None:
    """Only for the member that is reset, and whichever way it is reset."""
    wait = waits(2)
    for mode, ends in (("SameStep", ["." * 3, "."]), ("NextStep", ["." * 3, "." * 4])):
        envs = make(2, autoreset_mode=mode, episode_steps=3, render_mode="ansi")
        envs.reset(seed=0)
        envs.step(wait)
        envs.reset(options={"reset_mask": np.array([True, False])})
        envs.step(wait)
        envs.step(wait)
        assert [lanes(envs, member)[0] for member in (0, 1)] == ends
        envs.step(wait)
        assert len(lanes(envs, 1)[0]) == (2 if mode == "SameStep" else 1)
    fresh, used = make(1), make(1)
    fresh.reset(seed=0)
    used.reset(seed=0)
    play(used, 5, seed=0)
    used.reset(seed=0)
    fresh_arrays = fresh.get_state()["arrays"]
    assert any(name.startswith("history.") for name in fresh_arrays)
    assert_same(used.get_state()["arrays"], fresh_arrays)


@pytest.mark.parametrize("mode", ["rgb_array", "ansi"])
def test_the_trace_goes_with_a_saved_state_into_another_render_mode(mode: str) -> None:
    """An environment that had the mode from the start shows the same."""
    envs, always, other = make(2), make(2, render_mode=mode), make(2, render_mode=mode)
    for each in (envs, always):
        each.reset(seed=0)
        play(each, 5)
    other.set_state(envs.get_state())
    expected = always.render()
    assert expected is not None
    assert_same(other.render(), expected)


def test_a_forked_member_has_the_past_of_its_source() -> None:
    envs = make(3, render_mode="ansi")
    envs.reset(seed=0)
    play(envs, 6, seed=0)
    before = envs.render()
    assert before is not None
    envs.fork([0], [2])
    assert envs.render() == (before[0], before[1], before[0])


def test_a_rollback_is_marked() -> None:
    for mode in ("ansi", "rgb_array"):
        envs = make(2, render_mode=mode)
        envs.reset(seed=0)
        envs.step(np.tile(action(Op.GERMINATE, blueprint=CONV_LIGHT), (2, 1)))
        poison(envs, 1)
        envs.step(waits(2))
        frames = envs.render()
        assert frames is not None
        if mode == "ansi":
            assert (lanes(envs, 0), lanes(envs, 1)) == ([".tt", "..."], [".t!", "..!"])
            assert "WAIT, rolled back" in str(frames[1])
        else:
            marks = [has_color(np.asarray(frame), ORANGE_RED) for frame in frames]
            assert marks == [False, True]


def test_rendering_before_reset_is_refused() -> None:
    for mode in ("rgb_array", "ansi"):
        for env in (make(2, render_mode=mode), make_single(render_mode=mode)):
            with pytest.raises(gym.error.ResetNeeded, match=r"reset\(\)"):
                env.render()


def test_rendering_without_a_mode_warns_and_shows_nothing() -> None:
    for env in (make(2), make_single()):
        env.reset(seed=0)
        with pytest.warns(UserWarning, match="without a render mode"):
            assert env.render() is None


def test_a_time_limit_from_outside_leaves_the_picture_in_the_middle_of_the_episode() -> None:
    env = TimeLimit(gym.make(ID, render_mode="ansi", **SMALL), 2)
    env.reset(seed=0)
    truncations = [env.step(action(Op.WAIT))[3] for _ in range(2)]
    assert truncations == [False, True]
    text = env.render()
    assert isinstance(text, str)
    assert "env step  2/12" in text
    env.reset()
    assert "env step  0/12" in str(env.render())


def test_a_video_of_an_episode_is_recorded_and_changes_nothing(tmp_path: Path) -> None:
    pytest.importorskip("moviepy")
    rewards: list[list[float]] = []
    for mode in (None, "rgb_array"):
        env: gym.Env[Any, Any] = gym.make(ID, render_mode=mode, **(SMALL | {"episode_steps": 3}))
        if mode is not None:
            env = gym.wrappers.RecordVideo(env, str(tmp_path / "videos"))
        env.reset(seed=0)
        actions = (action(Op.GERMINATE, blueprint=CONV_LIGHT), action(Op.WAIT), action(Op.WAIT))
        rewards.append([float(env.step(a)[1]) for a in actions])
        env.close()
    assert rewards[0] == rewards[1]
    (video,) = (tmp_path / "videos").glob("*.mp4")
    from moviepy import VideoFileClip

    with VideoFileClip(str(video)) as clip:
        assert clip.size == [WIDTH, HEIGHT]
        assert (clip.fps, clip.n_frames) == (10, 4)


def test_a_video_of_all_members_is_recorded(tmp_path: Path) -> None:
    pytest.importorskip("moviepy")
    envs = gym.wrappers.vector.RecordVideo(
        gym.make_vec(ID, num_envs=2, render_mode="rgb_array", **SMALL), str(tmp_path / "videos")
    )
    envs.reset(seed=0)
    envs.step(waits(2))
    envs.close()
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 1

"""Text of docs/environment.md: the docstring of `EsperEnv` and tables generated from the code.

The tables below explain what has no docstring, for example transitions and the keys of info. An
error is raised if a table lacks an entry that exists in the code, or has one that does not exist.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from fractions import Fraction

import numpy as np

import esper_env
from docs.page import COMMAND, table
from docs.results import ADAPTIVITY, read, signed_interval
from docs.source import (
    field_docstrings,
    field_types,
    first_line,
    must_cover,
    registries_as_shipped,
    signature,
)
from esper_env import EnvConfig, EsperEnv, EsperVectorEnv, Op, Stage
from esper_env.config import STYLES
from esper_env.envs.registration import ENVIRONMENTS
from esper_env.growth.action_space import HEAD_NAMES, RELEVANT_HEADS
from esper_env.growth.lifecycle import TRANSITIONS
from esper_env.growth.observation import BUDGET_FEATURE, episode_features, slot_features
from esper_env.growth.reward import (
    PRESETS,
    PROGRESS_HALF_LIFE_STEPS,
    STAGE_POTENTIAL,
    STAGE_PROGRESS,
    TERMS,
)
from esper_env.population.blueprints import CNN_BLUEPRINTS, Blueprint
from esper_env.population.layers import Conv, Layer, Norm, Relu, SqueezeExcite
from esper_env.population.layout import gate_specs
from esper_env.tasks import TASKS
from esper_env.tasks.instances import SET_SIZES, InstanceRanges

DEFAULT_ID = "Esper-Digits-v0"
BLUEPRINT_NAMES = [blueprint.name for blueprint in CNN_BLUEPRINTS]

HEAD_MEANINGS = {
    "op": "operation",
    "slot": "slot of the operation; the host has one slot per block",
    "blueprint": "blueprint of the new seed: the built-in ones, then registered ones",
    "style": "curve of the first ramp, and blend",
    "tempo": "length of the first ramp [env steps]",
    "alpha_target": "alpha at the end of the ramp",
    "alpha_speed": "length of a later ramp [env steps]; at 0 alpha changes at once",
    "alpha_curve": "curve of a later ramp",
}

OP_RULES = {
    Op.WAIT: "always",
    Op.GERMINATE: "the stage is DORMANT; G0 passes for the blueprint",
    Op.ADVANCE: "G1, G2 or G3 passes",
    Op.SET_ALPHA: "the stage is BLENDING or HOLDING; no ramp is running; alpha_target differs from "
    "the current target. With `parking` alpha_target 0 needs HOLDING; with `parks_fossilized` the "
    "targets 0 and 1 are also legal in FOSSILIZED",
    Op.PRUNE: "the stage is GERMINATED, TRAINING, BLENDING or HOLDING; no ramp is running; the age "
    "of the seed is at least `min_prune_age`; alpha_speed is 0 if alpha is 0",
    Op.FOSSILIZE: "the stage is HOLDING; G5 passes",
}
"""Conditions under which an op is legal in a slot; G0 to G5 are in `TRANSITION_RULES`."""

_PRUNE_AT_ONCE = "PRUNE with alpha_speed 0; rollback"
_PRUNE_AGE = "for PRUNE: the age of the seed is at least `min_prune_age`"
TRANSITION_RULES: dict[tuple[Stage, Stage], tuple[str, str]] = {
    (Stage.DORMANT, Stage.GERMINATED): (
        "GERMINATE",
        "G0: fewer than `max_seeds` seeds exist; the parameters of all seeds and of the new one, "
        "each counted with a gate, are at most `parameter_budget` times those of the host",
    ),
    (Stage.GERMINATED, Stage.TRAINING): (
        "tick of the same env step; ADVANCE with `automatic_training=False`",
        "G1: no condition",
    ),
    (Stage.GERMINATED, Stage.HOLDING): ("GERMINATE with `graft=True`", "no condition"),
    (Stage.TRAINING, Stage.BLENDING): (
        "ADVANCE; also tick with `automatic_blending=True`",
        "G2: the seed has spent at least `min_training_steps` env steps in TRAINING; in the last "
        "env step it received a gradient, no tensor had a gradient norm above "
        "`exploding_gradient_norm`, and its `gradient_health` (a feature of the observation) was "
        "at least `min_gradient_health`",
    ),
    (Stage.BLENDING, Stage.HOLDING): (
        "tick; ADVANCE with `automatic_holding=False`",
        "G3: alpha is 1; no ramp is running",
    ),
    (Stage.HOLDING, Stage.BLENDING): (
        "SET_ALPHA with a target other than 0 and 1; PRUNE with alpha_speed above 0",
        _PRUNE_AGE,
    ),
    (Stage.HOLDING, Stage.FOSSILIZED): (
        "FOSSILIZE",
        "G5: alpha is 1; the contribution has been measured (except with "
        '`attribution="none"`); with `strict_fossilize` it is at least `min_contribution`',
    ),
    (Stage.GERMINATED, Stage.EMBARGOED): (_PRUNE_AT_ONCE, _PRUNE_AGE),
    (Stage.TRAINING, Stage.EMBARGOED): (_PRUNE_AT_ONCE, _PRUNE_AGE),
    (Stage.BLENDING, Stage.EMBARGOED): (
        f"{_PRUNE_AT_ONCE}; tick at the end of the ramp of a PRUNE",
        f"{_PRUNE_AGE}; no ramp is running",
    ),
    (Stage.HOLDING, Stage.EMBARGOED): (_PRUNE_AT_ONCE, _PRUNE_AGE),
    (Stage.EMBARGOED, Stage.DORMANT): ("tick", "the stage has lasted `embargo_steps` env steps"),
}
"""Cause and condition of each transition."""

INFO_MEANINGS = {
    "action_mask": "marginal mask of the next action; True means legal",
    "action_valid": "True if the last action was legal, and after a reset",
    "op": "op of the last env step, a value of `Op`; WAIT (0) if the action was illegal",
    "accuracy": "validation accuracy of the live network, 0 to 1",
    "loss": "validation loss of the live network [nats]",
    "committed_accuracy": "validation accuracy of the committed network",
    "score": "score of the live network",
    "committed_score": "score of the committed network; with "
    '`objective="anytime"` what the episode has earned so far',
    "contribution": "last measured contribution of each seed: accuracy minus accuracy without it "
    '(its Shapley value with `attribution="full"`); 0 before the first measurement',
    "contribution_valid": "True if the contribution has been measured",
    "stage": "values of `Stage`",
    "alpha": "blend weights, 0 to 1",
    "blueprint": "row in the table of blueprints, -1 for a slot without a seed; it differs from "
    "the option of the head if `heads` restricts the blueprints",
    "parameters": "parameters of all seeds, including the gates of LINEAR_GATE",
    "host_parameters": "parameters of the host",
    "flops": "floating-point operations of training in this episode: 6 per image and multiply-add "
    "of host and seeds, without gates",
    "samples": "training images of this episode so far",
    "reward_terms": "weighted value of each reward term; their sum is the reward",
    "rolled_back": "True if the last env step included a rollback",
    "flag_parasite": "True for a trial seed whose contribution of this env step exceeds "
    "`flag_contribution` although the live network is less accurate than the committed one",
    "flag_attribution": "True if the positive contributions of trial seeds sum to more than "
    "`flag_ratio` times the accuracy that they gain together, and to more than `flag_contribution`",
    "flag_churn": "True after `flag_prunes` prunes of seeds younger than `flag_age` in the episode",
    "gradient_cause": "cause of a low gradient, a value of `GradientCause`",
    "instance": "index of the instance in the configured set",
    "regime": "kind of problem that comes next; only in ids with [regimes](#regimes), for oracles",
    "test_accuracy": "test accuracy of the live network; only after the last step",
    "committed_test_accuracy": "test accuracy of the committed network; only after the last step",
}


def environment_page() -> str:
    """Return the docstring of `EsperEnv`, with tables under its headings."""
    text, _, arguments = inspect.cleandoc(EsperEnv.__doc__ or "").partition("\nArgs:\n")
    title, *sections = re.split(r"^## (.*)\n", text, flags=re.M)
    parts = [
        f"<!-- Written by `{COMMAND}` from the code. Do not edit. -->",
        "# The Esper environments",
        title.strip(),
    ]
    extra = section_tables(arguments)
    names = sections[::2]
    must_cover("sections of the docstring", names, extra)
    for name, body in zip(names, sections[1::2], strict=True):
        if name == "Version History":
            parts += ["## Python interface", *interface()]
        parts += [f"## {name}", body.strip(), *extra[name]]
    return "\n\n".join(parts) + "\n"


def section_tables(arguments: str) -> dict[str, list[str]]:
    """Return the blocks of Markdown that follow the text of each section.

    Args:
        arguments: The `Args:` section of the docstring.
    """
    episode, slot = episode_features(), slot_features(BLUEPRINT_NAMES)
    return {
        "Description": [
            *("### Ids", ids_table(), *settings_of_ids(), *adaptivity_of_ids()),
            *("### Lifecycle", *lifecycle()),
        ],
        "Action Space": [
            "### Heads and their options",
            heads_table(),
            "A ramp of N env steps starts in the env step of its action and ends exactly at its "
            "target. After n env steps, with t = n / N, alpha has covered this share of the "
            "distance: t for LINEAR; (1 - cos πt) / 2 for COSINE; the logistic function of "
            "k (t - 1/2), rescaled to run from 0 to 1, for SIGMOID_k.",
            "### Heads of each op",
            relevance_table(),
            "### Legal ops",
            ops_table(),
            "### Blueprints",
            *blueprint_tables(),
            "### Styles",
            styles_table(),
        ],
        "Observation Space": [
            "### Number of features",
            feature_counts_table(episode, slot),
            "### Episode block",
            features_table(episode),
            "### Block of one slot",
            "The names in the block of slot 0 begin with `slot_0.`, those of slot 1 with "
            "`slot_1.`. Each registered blueprint adds one feature to every block.",
            features_table(slot),
        ],
        "Rewards": [
            "### Presets and terms",
            rewards_table(),
            "### Potential of the term `pbrs`",
            *potential(),
        ],
        "Starting State": ["### Instances", *instances(), "### Regimes", *regimes()],
        "Episode End": [],
        "Information": [info_table()],
        "Rendering": [],
        "Arguments": [
            "### Arguments of `gym.make`",
            arguments_table(arguments),
            "### Arguments of `gym.make_vec`",
            arguments_table(inspect.cleandoc(EsperVectorEnv.__doc__ or "").partition("Args:\n")[2]),
            "### Fields of EnvConfig",
            "Each field is a keyword of `gym.make` and `gym.make_vec`. [Each id](#ids) has its own "
            "`task`, `episode_steps`, `batches_per_step` and `batch_size`; a keyword overrides it.",
            config_table(),
        ],
        "Version History": [],
    }


def ids_table() -> str:
    """Return id, data, host and length of every registered environment."""
    rows = []
    for name, (task_name, _) in ENVIRONMENTS.items():
        config, task = EsperEnv(task=task_name).config, TASKS[task_name]
        host = task.host
        data = first_line(task.load).removeprefix("Return ").removesuffix(".")
        if task.augments:
            data += "; random shifts and mirror images in training"
        size = f"{host.image_size}×{host.image_size}×{host.in_channels}"
        channels = "-".join(str(c) for c in host.channels)
        rows.append(
            (
                f"`{name}`",
                f"{data}; {size} pixels, {host.num_classes} classes",
                f"{channels} channels, {host.kernel_size}×{host.kernel_size}",
                f"{host.num_parameters:,}",
                host.num_slots,
                config.episode_steps,
                f"{config.batches_per_step} × {config.batch_size}",
            )
        )
    head = ("id", "data", "host", "parameters", "slots", "env steps", "batches per env step")
    return table(head, rows)


def adaptivity_of_ids() -> list[str]:
    """Return what an agent can gain in each id that was measured."""
    rows = []
    for name, file in ADAPTIVITY.items():
        paired = read(file)["paired"]
        # Without regimes there is nothing to know but the instance.
        known = "oracle" if "oracle - open_loop" in paired else "open_loop of each instance"
        pair = paired[f"{known} - open_loop"]
        gap = "yes" if pair["low"] > 0 else "not shown: a plan made beforehand is as good"
        rows.append((f"`{name}`", gap, signed_interval(pair, 3)))
    return [
        "Some ids need an agent that adapts. The *adaptivity gap* is the score of an oracle, which "
        "knows the hidden kind of problem, minus that of the best open loop, a plan that acts at "
        "fixed env steps (95 % interval; see [Results](results.md)). In `Esper-Digits-v0` it is "
        "the score of the best plan of each instance. In the other ids it has not been measured.",
        table(("id", "adaptivity gap", "oracle minus best open loop"), rows),
    ]


def settings_of_ids() -> list[str]:
    """Return the settings in which an id differs from `EnvConfig`, beside sizes."""
    shown = {"episode_steps", "batches_per_step", "batch_size"}
    rows = []
    for name, (task, _) in ENVIRONMENTS.items():
        settings = TASKS[task].defaults.items()
        texts = [f"`{key}={value!r}`" for key, value in settings if key not in shown]
        if texts:
            rows.append((f"`{name}`", ", ".join(texts)))
    return [
        "Further settings of an id that differ from the defaults:",
        table(("id", "settings"), rows),
    ]


def regimes() -> list[str]:
    """Return the kinds of problems of each id, and how they change."""
    rows = []
    for name, (task_name, _) in ENVIRONMENTS.items():
        task = TASKS[task_name]
        if task.regimes is None:
            continue
        changes = "none"
        if task.regimes.dwell is not None:
            least, mean = task.regimes.dwell
            changes = f"after at least {least} and on average {mean:g} env steps"
        for i, kind in enumerate(task.regimes.kinds):
            classes = _range(kind.num_classes) if kind.num_classes else "all"
            level = "with noise" if kind.distortion else "as they are"
            pairs = _range(kind.swapped_pairs)
            rows.append((f"`{name}`", f"{i}, {kind.name}", classes, level, pairs, changes))
    head = (
        "id",
        "`regime`, name",
        "classes in use",
        "images",
        "pairs of swapped labels",
        "changes",
    )
    return [table(head, rows)]


def _range(limits: tuple[int, int]) -> str:
    return str(limits[0]) if limits[0] == limits[1] else f"{limits[0]} to {limits[1]}"


def lifecycle() -> list[str]:
    """Return the table of transitions."""
    must_cover("lifecycle.TRANSITIONS", TRANSITIONS, TRANSITION_RULES)
    rows = [
        (f"{source.name} → {target.name}", *rule)
        for (source, target), rule in TRANSITION_RULES.items()
    ]
    return [
        "The table lists all transitions. *Tick* is phase 2 of an env step and needs no action. "
        "*Rollback* is described under [Episode End](#episode-end). G0 to G3 and G5 are gates: "
        "conditions that the masks and the transitions test by the same functions.",
        table(("from → to", "by", "needs"), rows),
    ]


def heads_table() -> str:
    """Return the heads of the default environment."""
    must_cover("actions.HEAD_NAMES", HEAD_NAMES, HEAD_MEANINGS)
    with registries_as_shipped():
        heads = EsperEnv().heads
    rows = [
        (i, head.name, ", ".join(str(o) for o in head.options), HEAD_MEANINGS[head.name])
        for i, head in enumerate(heads)
    ]
    return table(("", "head", f"options (of `{DEFAULT_ID}`)", "meaning"), rows)


def relevance_table() -> str:
    """Return the heads that each op uses."""
    rows = [
        (op.name, *("●" if name in relevant else "" for name in HEAD_NAMES))
        for op, relevant in RELEVANT_HEADS.items()
    ]
    return table(("op", *HEAD_NAMES), rows)


def ops_table() -> str:
    """Return the conditions under which each op is legal."""
    must_cover("Op", Op, OP_RULES)
    return table(("op", "legal in a slot if"), [(op.name, OP_RULES[op]) for op in Op])


def blueprint_tables() -> list[str]:
    """Return the built-in blueprints with their sizes in the slots of the digits host."""
    host = TASKS["digits"].host
    head = ["blueprint", "layers d(x)"]
    for s, c in enumerate(host.channels):
        where = f"slot {s} (C = {c}, {host.slot_size(s)}×{host.slot_size(s)})"
        head += [f"parameters in {where}", "multiply-adds"]
    rows = []
    for blueprint in CNN_BLUEPRINTS:
        row = [f"`{blueprint.name}`", describe(blueprint)]
        for s, c in enumerate(host.channels):
            size = host.slot_size(s)
            row += [
                f"{blueprint.num_parameters(c):,}",
                f"{blueprint.multiply_adds(c, size, size):,}",
            ]
        rows.append(row)
    gates = ", ".join(
        f"{sum(spec.size for spec in gate_specs(c))} in slot {s}"
        for s, c in enumerate(host.channels)
    )
    return [
        "C is the number of channels at the slot. *Zero* marks the parameters that are initialized "
        f"to 0, so that a new seed outputs 0. Sizes are given for the host of `{DEFAULT_ID}`; "
        f"multiply-adds are per image. Style LINEAR_GATE adds C + 1 parameters: {gates}. "
        "[Registered blueprints](extending.md) follow in the order of registration.",
        table(head, rows),
    ]


def describe(blueprint: Blueprint) -> str:
    """Return the layers of a blueprint as a formula in the number of channels C."""
    layers = {c: list(blueprint.build(c)) for c in (1, 4, 8, 64)}
    return ", ".join(
        _describe_layer({c: layers[c][i] for c in layers}) for i in range(len(layers[64]))
    )


def _describe_layer(by_channels: Mapping[int, Layer]) -> str:
    """Describe a layer from instances for several numbers of channels."""

    def of(name: str) -> str:
        return _symbol({c: getattr(layer, name) for c, layer in by_channels.items()})

    layer = by_channels[64]
    if isinstance(layer, Conv):
        kind = "depthwise conv" if layer.groups == layer.in_channels else "conv"
        size = f"{layer.kernel_size}×{layer.kernel_size} {kind} {of('in_channels')}→"
        text = size + of("out_channels") + (" + bias" if layer.bias else "")
        return text + (" (*zero*)" if layer.zero else "")
    if isinstance(layer, Norm):
        return "batch norm" + (" (*zero* scale)" if layer.zero else "")
    if isinstance(layer, SqueezeExcite):
        return f"x · tanh(B · silu(A · mean(x))), affine A: C→{of('hidden')}, affine B (*zero*)"
    if isinstance(layer, Relu):
        return "relu"
    raise ValueError(f"docs/environment.py: no description of layer {type(layer).__name__}")


def _symbol(values: Mapping[int, int]) -> str:
    """Return a size as a formula in C, from its values for several C."""
    ratio, least = Fraction(values[64], 64), values[1]
    assert all(v == max(least, int(ratio * c)) for c, v in values.items()), values
    factor = "" if ratio.numerator == 1 else str(ratio.numerator)
    text = f"{factor}C" if ratio.denominator == 1 else f"{factor}C/{ratio.denominator}"
    return text if least <= max(1, int(ratio)) else f"max({least}, {text})"


def styles_table() -> str:
    """Return curve and blend of each style."""
    rows = [(style.name, style.curve.name, style.blend.name) for style in STYLES]
    return table(("style", "curve of the first ramp", "blend (see Description)"), rows)


def feature_counts_table(episode: Mapping[str, str], slot: Mapping[str, str]) -> str:
    """Return the number of features of every id, with the built-in blueprints."""
    rows = []
    for name, (task_name, _) in ENVIRONMENTS.items():
        slots = TASKS[task_name].host.num_slots
        has_budget = TASKS[task_name].defaults.get("clock") == "flops"
        own = len(episode) - (BUDGET_FEATURE in episode and not has_budget)
        total = own + slots * len(slot)
        rows.append((f"`{name}`", f"{own} + {slots} × {len(slot)} = {total}"))
    return table(("id", "episode block + slots × slot block"), rows)


def features_table(features: Mapping[str, str]) -> str:
    """Return positions, names and meanings of features."""
    rows = [(i, f"`{name}`", text) for i, (name, text) in enumerate(features.items())]
    return table(("", "feature", "meaning"), rows)


def rewards_table() -> str:
    """Return the terms and their weights in every preset."""
    head = ("term", "meaning", *(f"weight in `{preset}`" for preset in PRESETS))
    rows = [
        (f"`{name}`", first_line(term), *(f"{p[name]:g}" if name in p else "" for p in presets))
        for presets in [list(PRESETS.values())]
        for name, term in TERMS.items()
    ]
    return table(head, rows)


def potential() -> list[str]:
    """Return the definition of the potential Phi and its constants of each stage."""
    rows = [
        (stage.name, f"{STAGE_POTENTIAL[stage]:g}", f"{STAGE_PROGRESS[stage]:g}") for stage in Stage
    ]
    return [
        "Phi of a state is the sum of the potentials of its slots. A slot that has been in its "
        "stage for n env steps has the potential "
        f"a + b * (1 - 0.5^(n / {PROGRESS_HALF_LIFE_STEPS:g})), where a and b depend on the stage:",
        table(("stage", "a", "b"), rows),
    ]


def instances() -> list[str]:
    """Return the sets of instances and the ranges of their conditions."""
    default = {
        "learning_rate": "`host_learning_rate`",
        "train_fraction": "1",
        "label_noise": "0",
        "compute": "1",
        "widths": "1",
        "test_size": "",
    }
    meanings = field_docstrings(InstanceRanges)
    must_cover("InstanceRanges", meanings, default)
    tasks = {name: task_name for name, (task_name, _) in ENVIRONMENTS.items()}
    columns: dict[InstanceRanges, list[str]] = {}
    for name, task in tasks.items():
        columns.setdefault(TASKS[task].ranges, []).append(f"`{name}`")
    rows = []
    for name, meaning in meanings.items():
        cells = []
        for ranges in columns:
            values = getattr(ranges, name)
            text = [f"{v:g}" for v in np.atleast_1d(values)]
            is_range = name not in ("widths", "test_size")
            cells.append(f"{text[0]} to {text[1]}" if is_range else ", ".join(text))
        rows.append((f"`{name}`", meaning, default[name], *cells))
    ranges_of = (", ".join(ids) for ids in columns.values())
    head = ("condition", "meaning", 'value in "default"', *ranges_of)
    return [
        f'The set "default" has one instance and "train" {SET_SIZES["train"]}. The sets are the '
        'same on every machine. "train" and "test" are sampled from different random streams.',
        table(head, rows),
    ]


def info_table() -> str:
    """Return the keys of info, with the types that a vector environment returns."""
    num_envs = 5
    with registries_as_shipped():
        # An id with regimes has all keys.
        sizes = {"episode_steps": 1, "batches_per_step": 1, "batch_size": 2}
        envs = EsperVectorEnv(num_envs, task="digits_sizing", **sizes)
    envs.reset(seed=0)
    *_, info = envs.step(envs.sample_valid_actions(np.random.default_rng(0)))
    values = {name: value for name, value in info.items() if not name.startswith("_")}
    must_cover("info", values, INFO_MEANINGS)
    symbols = {num_envs: "N", len(envs.heads[1].options): "S", envs.action_masks().shape[1]: "M"}
    rows = []
    for name, value in values.items():
        if isinstance(value, dict):
            terms = [key for key in value if not key.startswith("_")]
            dtype, shape = f"dict of {value[terms[0]].dtype}", value[terms[0]].shape
        else:
            dtype, shape = str(value.dtype), value.shape
        dims = ", ".join(symbols[n] for n in shape) + ("," if len(shape) == 1 else "")
        rows.append((f"`{name}`", dtype, f"({dims})", INFO_MEANINGS[name]))
    return (
        "N is the number of sub-environments; the single environment has no such axis. S is the "
        "number of slots. M is the number of options of all heads, sum(nvec). With autoreset mode "
        "SAME_STEP the vector environment adds Gymnasium's `final_obs` and `final_info` in steps "
        "after which sub-environments are done.\n\n"
    ) + table(("key", "dtype", "shape", "meaning"), rows)


def arguments_table(arguments: str) -> str:
    """Return the arguments of a constructor from that section of its docstring."""
    section = arguments.partition("\nRaises:\n")[0]
    entries = re.findall(r"^    (\S+): (.*(?:\n {5,}.*)*)", section, flags=re.M)
    rows = [(f"`{name}`", " ".join(text.split())) for name, text in entries]
    return table(("argument", "meaning"), [row for row in rows if "**" not in row[0]])


def config_table() -> str:
    """Return every field of `EnvConfig` with type, default and docstring."""
    config, rows = EnvConfig(), []
    types = field_types(EnvConfig)
    for name, meaning in field_docstrings(EnvConfig).items():
        value = getattr(config, name)
        rows.append((f"`{name}`", f"`{types[name]}`", f"`{value!r}`", meaning))
    return table(("field", "type", "default", "meaning"), rows)


def interface() -> list[str]:
    """Return the public names of the package and of both environments."""
    names = []
    for name in esper_env.__all__:
        thing = getattr(esper_env, name)
        call = name + signature(thing) if inspect.isfunction(thing) else name
        names.append((f"`{call}`", first_line(thing)))
    return [
        "### `esper_env`",
        table(("name", "meaning"), names),
        "### `EsperEnv`",
        table(("name", "meaning"), members_of(EsperEnv)),
        "### `EsperVectorEnv`",
        "The attributes `config`, `gamma`, `heads` and `observation_names` are those of "
        "`EsperEnv`.",
        table(("name", "meaning"), members_of(EsperVectorEnv)),
    ]


def members_of(cls: type) -> list[tuple[str, str]]:
    """Return the public properties and methods of a class with the first lines of their docs."""
    rows = []
    for name, member in vars(cls).items():
        # Gymnasium calls close_extras; users call close, which it inherits.
        if name.startswith("_") or name == "close_extras":
            continue
        if isinstance(member, property):
            rows.append((f"`{name}`", first_line(member)))
        elif inspect.isfunction(member):
            rows.append((f"`{name}{signature(member)}`", first_line(member)))
    return rows

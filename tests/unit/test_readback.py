"""Reading back: a healthy run has no failed check, and each error planted in a live object turns its own lever red."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import TrainingArguments
from transformers.optimization import get_linear_schedule_with_warmup

from memfit.build.checkpointing import checkpointing_modes, set_checkpointing
from memfit.build.loss import DeferredHead, causal_loss
from memfit.engine.readback import learning as learning_reader
from memfit.engine.readback.data import dataset_of, marked_text
from memfit.engine.readback.live import Asked, Facts, Live
from memfit.engine.readback.optimizer import innermost
from memfit.engine.readback.read import BEFORE, read_after_steps, read_back
from memfit.engine.readback.reading import Reading, joined, tried
from memfit.engine.readback.schedule import scheduler_of
from memfit.engine.readback.seen import Seen
from memfit.specs.recipe import Recipe
from tests.unit.readback_live import Begin, begin, failed

Make = Callable[..., Recipe]
Fault = Callable[[Begin], Any]  # a context, or a change that nobody takes back
FULL = ("levers.precision=bf16-amp", "levers.checkpointing=full", "schedule.weight_decay=0.1", "schedule.steps=20")
LORA = (
    *("method=lora", "levers.precision=pure-bf16", "levers.checkpointing=selective", "levers.loss=chunked"),
    *("lora.dropout=0.05", "schedule.steps=20", "schedule.kind=linear", "schedule.warmup=0.2"),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {"root": tmp_path_factory.mktemp("readback")}


@pytest.fixture
def full(recipe: Make, runs: dict[str, Any]) -> Begin:
    """A full fine-tune of a tiny MiniCPM-V 4.6 as it begins; tests leave it as they found it."""
    if "full" not in runs:
        runs["full"] = begin(recipe("minicpmv4_6", *FULL), runs["root"] / "full")
    return runs["full"]


@pytest.fixture
def lora(recipe: Make, runs: dict[str, Any]) -> Begin:
    """A LoRA run of a tiny Qwen2.5-VL as it begins."""
    if "lora" not in runs:
        runs["lora"] = begin(recipe("qwen2_5_vl", *LORA), runs["root"] / "lora")
    return runs["lora"]


# ---- healthy runs --------------------------------------------------------------------------------------------------


def judged(checks: Any) -> set[str]:
    return {check.lever for check in checks if check.ok}


def test_a_full_run_is_in_effect(full: Begin) -> None:
    found = full.before()
    assert not failed(found), [check for check in found if check.ok is False]
    wanted = {"parts.vision", "levers.precision", "levers.parallel", "levers.optimizer", "schedule.kind", "batch"}
    wanted |= {"levers.micro_batch", "image budget", "image tokens", "labels", "what is trained", "image placeholders"}
    assert wanted <= judged(found)
    later = full.after()
    assert not failed(later), [check for check in later if check.ok is False]
    wanted = {"levers.checkpointing (vision)", "levers.checkpointing (language)", "levers.attention (vision)"}
    wanted |= {"levers.attention (language)", "levers.linear_attention", "logits for backward", "dead parameters"}
    wanted |= {"gradients' dtype", "optimizer states", "learning rate in force", "levers.autocast"}
    assert wanted <= judged(later)


@pytest.mark.long
def test_a_lora_run_is_in_effect(lora: Begin) -> None:
    found = lora.before()
    assert not failed(found), [check for check in found if check.ok is False]
    assert {"lora.targets", "lora.rank", "lora.alpha", "lora.dropout", "lora.init", "lora.dtype"} <= judged(found)
    later = lora.after()
    assert not failed(later), [check for check in later if check.ok is False]
    assert {"graph of frozen parts", "levers.checkpointing (language)", "dead parameters"} <= judged(later)
    assert "levers.checkpointing (vision)" in {check.lever for check in later}


def test_without_a_plan_everything_is_stated_and_nothing_judged_by_it(full: Begin) -> None:
    """A trainer that memfit did not build: what is wrong whatever was asked still fails."""
    live = dataclasses.replace(full.live, family=None, encoder=None, decode=None)
    found = read_back(live, None, Facts())
    assert not failed(found)
    stated = {check.lever for check in found if check.ok is None}
    assert {"parts.vision", "levers.parallel", "levers.optimizer", "schedule.learning_rate", "batch"} <= stated
    with label_of(full.live, lambda labels, ids: torch.full_like(labels, -100)):
        assert "labels" in failed(read_back(live, None, Facts()))


def test_the_sample_is_shown_with_what_carries_loss_marked(full: Begin) -> None:
    text = marked_text(full.live)
    assert "[[{" in text
    assert "}<|im_end|>]]" in text
    assert "image tokens>" in text
    assert "How many" not in text.split("[[")[1]


# ---- faults that show before the first step ------------------------------------------------------------------------


@contextlib.contextmanager
def changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of a live object with another value."""
    put = (
        functools.partial(object.__setattr__, owner)
        if dataclasses.is_dataclass(owner)
        else functools.partial(setattr, owner)
    )
    own = name in vars(owner) or name in vars(owner).get("_modules", {})
    old = getattr(owner, name)
    put(name, value)
    try:
        yield
    finally:
        if own or isinstance(getattr(type(owner), name, None), property):
            put(name, old)
        else:
            delattr(owner, name)


@contextlib.contextmanager
def item(owner: Any, key: Any, value: Any) -> Iterator[None]:
    """An entry of a live mapping with another value."""
    old = owner[key]
    owner[key] = value
    try:
        yield
    finally:
        owner[key] = old


def args(name: str, value: Any) -> Fault:
    return lambda run: changed(run.live.trainer.args, name, value)


def group(key: str, value: Any, place: int = 0) -> Fault:
    return lambda run: item(innermost(run.live.trainer.optimizer).param_groups[place], key, value)


def label_of(live: Live, change: Callable[[Any, Any], Any]) -> Any:
    """The live collator with its labels changed."""
    collate = live.trainer.data_collator

    def changing(rows: Any) -> Any:
        batch = dict(collate(rows))
        return batch | {"labels": change(batch["labels"], batch["input_ids"])}

    return changed(live.trainer, "data_collator", changing)


def labels(change: Callable[[Any, Any, int], Any]) -> Fault:
    return lambda run: label_of(run.live, lambda given, ids: change(given, ids, run.live.image_token_id or 0))


def shortened(run: Begin) -> Any:
    """A collator that cuts sequences at 40 tokens, in the middle of a picture."""
    collate = run.live.trainer.data_collator

    def cutting(rows: Any) -> Any:
        batch = dict(collate(rows))
        return batch | {name: batch[name][:, :20] for name in ("input_ids", "labels")}

    return changed(run.live.trainer, "data_collator", cutting)


@contextlib.contextmanager
def learning(run: Begin, part: str, value: bool) -> Iterator[None]:
    changed_ = [
        p for n, p in run.live.model.named_parameters() if run.live.part_of(n) == part and p.requires_grad != value
    ]
    for parameter in changed_:
        parameter.requires_grad_(value)
    try:
        yield
    finally:
        for parameter in changed_:
            parameter.requires_grad_(not value)


@contextlib.contextmanager
def cast(run: Begin, part: str, dtype: torch.dtype) -> Iterator[None]:
    """All weights of a part in another dtype."""
    old = [(p, p.data) for n, p in run.live.model.named_parameters() if run.live.part_of(n) == part]
    for parameter, data in old:
        parameter.data = data.to(dtype)
    try:
        yield
    finally:
        for parameter, data in old:
            parameter.data = data


def scheduler(kind: Callable[[Any], Any]) -> Fault:
    return lambda run: changed(run.live.trainer, "lr_scheduler", kind(run))


def linear(run: Begin) -> Any:
    """As an engine file's own scheduler would: other steps, other shape."""
    inner = innermost(run.live.trainer.optimizer)
    rates = [dict(g) for g in inner.param_groups]
    made = get_linear_schedule_with_warmup(inner, 1, 100)
    for live_group, old in zip(inner.param_groups, rates, strict=True):
        live_group["lr"] = old["lr"]
    return made


def of_another(run: Begin) -> Any:
    """The right schedule over an optimizer that does not step."""
    right = scheduler_of(run.live)
    other = torch.optim.AdamW([{"params": [nn.Parameter(torch.zeros(1))]} for _ in right.lr_lambdas], lr=1.0)
    return torch.optim.lr_scheduler.LambdaLR(other, right.lr_lambdas)


@contextlib.contextmanager
def pixels(run: Begin) -> Iterator[None]:
    """The image processor takes its own default again: the budget is gone."""
    processor = dataset_of(run.live)._pixels._processor
    with changed(processor, "max_slice_nums", 9):
        yield


def first_group_lost(run: Begin) -> Any:
    inner = innermost(run.live.trainer.optimizer)
    return item(inner.param_groups[0], "params", inner.param_groups[0]["params"][1:])


def other_class(run: Begin) -> Any:
    wrapper: Any = run.live.trainer.optimizer
    had = wrapper.optimizer
    made = torch.optim.SGD(
        [
            {**{k: g[k] for k in ("params", "lr", "weight_decay")}, "initial_lr": g["initial_lr"]}
            for g in had.param_groups
        ]
    )
    return changed(wrapper, "optimizer", made)


@contextlib.contextmanager
def _both(*contexts: Any) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def _two_ranks(run: Begin) -> Any:
    return changed(run.live.trainer, "args", _Args(run.live.trainer.args, world_size=2))


class _Args:
    """Arguments as another number of ranks would have them; everything else is the live ones'."""

    def __init__(self, real: TrainingArguments, **values: Any) -> None:
        vars(self).update(_real=real, **values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


BEFORE_FAULTS: dict[str, tuple[Fault, set[str]]] = {
    "vision frozen": (lambda run: learning(run, "vision", False), {"parts.vision", "stepped parameters"}),
    "bf16 load": (lambda run: cast(run, "language", torch.bfloat16), {"levers.precision"}),
    "another optimizer": (other_class, {"levers.optimizer", "schedule.betas"}),
    "optimizer of half the model": (first_group_lost, {"stepped parameters"}),
    "not fused": (group("fused", False), {"levers.optimizer"}),
    "another rate": (group("initial_lr", 3e-4), {"schedule.learning_rate"}),
    "other betas": (group("betas", (0.9, 0.95)), {"schedule.betas"}),
    "another eps": (group("eps", 1e-6), {"schedule.betas"}),
    "no decay": (group("weight_decay", 0.0), {"schedule.weight_decay"}),
    "another schedule": (scheduler(linear), {"schedule.kind"}),
    "a schedule that steers nothing": (scheduler(of_another), {"scheduler's optimizer"}),
    "half the steps": (args("max_steps", 10), {"schedule.steps"}),
    "no clipping": (args("max_grad_norm", 0.0), {"schedule.clip"}),
    "another accumulation": (args("gradient_accumulation_steps", 1), {"batch"}),
    "another micro-batch": (
        lambda run: changed(run.live.trainer, "_train_batch_size", 1),
        {"levers.micro_batch", "batch"},
    ),
    "loss scaling": (
        lambda run: changed(run.live.trainer.accelerator, "scaler", types.SimpleNamespace(is_enabled=lambda: True)),
        {"loss scaling"},
    ),
    "another seed": (args("seed", 1), {"seed"}),
    "evaluation keeps logits": (
        lambda run: _both(args("prediction_loss_only", False)(run), changed(run.live.trainer, "compute_metrics", len)),
        {"evaluation keeps"},
    ),
    "more checkpoints": (args("save_total_limit", 9), {"run.keep"}),
    "pixel cap ignored": (pixels, {"image budget"}),
    "encoder with another budget": (
        lambda run: item(run.live.encoder.processor_settings, "max_slice_nums", 1),  # type: ignore[union-attr]
        {"image tokens", "image placeholders"},
    ),
    "labels all masked": (
        labels(lambda given, ids, image: torch.full_like(given, -100)),
        {"labels", "what is trained"},
    ),
    "prompt trained": (
        labels(lambda given, ids, image: torch.where(ids == image, given, ids)),
        {"what is trained"},
    ),
    "placeholders trained": (
        labels(lambda given, ids, image: torch.where(ids == image, ids, given)),
        {"image placeholders in the loss"},
    ),
    "labels shifted": (labels(lambda given, ids, image: given.roll(-1, 1)), {"labels are the tokens"}),
    "image placeholders cut": (shortened, {"image placeholders", "labels", "what is trained"}),
    "tokens of each rank": (
        lambda run: _both(args("average_tokens_across_devices", False)(run), _two_ranks(run)),
        {"loss is a mean over", "batch", "hardware (ranks)"},
    ),
    "fewer samples": (lambda run: changed(run.facts, "train_samples", 99), {"data.train (samples)"}),
}


@pytest.mark.long
@pytest.mark.parametrize("name", BEFORE_FAULTS)
def test_a_fault_before_the_first_step_turns_its_lever_red(full: Begin, name: str) -> None:
    fault, wanted = BEFORE_FAULTS[name]
    with fault(full):
        found = full.before()
    assert failed(found) == wanted
    assert all(check.evidence and check.fix for check in found if check.ok is False)


# ---- adapters ------------------------------------------------------------------------------------------------------


def adapters(run: Begin) -> list[tuple[str, LoraLayer]]:
    return [(name, module) for name, module in run.live.model.named_modules() if isinstance(module, LoraLayer)]


@contextlib.contextmanager
def without_one(run: Begin) -> Iterator[None]:
    """One adapter less: its layer stands there as it was before."""
    name, layer = adapters(run)[0]
    parent, _, child = name.rpartition(".")
    owner = run.live.model.get_submodule(parent)
    with changed(owner, child, layer.get_base_layer()):
        yield


@contextlib.contextmanager
def in_the_tower(run: Begin) -> Iterator[None]:
    """An adapter in the frozen vision tower, as a pattern over all parts puts there."""
    inside = ".visual.blocks.0.attn."
    name, module = next((n, m) for n, m in run.live.model.named_modules() if inside in n and isinstance(m, nn.Linear))
    parent, _, child = name.rpartition(".")
    kind: Any = type(adapters(run)[0][1])
    config: Any = run.live.model.peft_config
    made = kind(module, "default", config=config["default"], r=4, lora_alpha=64)
    for adapter in (made.lora_A, made.lora_B):
        adapter.float()
    with changed(run.live.model.get_submodule(parent), child, made):
        yield


def setting(name: str, value: Any) -> Fault:
    return lambda run: item(getattr(adapters(run)[0][1], name), "default", value)


@contextlib.contextmanager
def trained_before(run: Begin) -> Iterator[None]:
    weight: torch.Tensor = adapters(run)[0][1].lora_B["default"].weight.data
    old = weight.clone()
    weight.add_(0.1)
    try:
        with changed(run.live.trainer.state, "global_step", 0):
            yield
    finally:
        weight.copy_(old)


@contextlib.contextmanager
def bf16_adapters(run: Begin) -> Iterator[None]:
    old = [(p, p.data) for name, p in run.live.model.named_parameters() if ".lora_" in name]
    for parameter, data in old:
        parameter.data = data.bfloat16()
    try:
        yield
    finally:
        for parameter, data in old:
            parameter.data = data


def _frozen(module: nn.Module) -> nn.Module:
    return module.bfloat16().requires_grad_(False)


def copied_head(run: Begin) -> Any:
    """PEFT's whole copy of a module that nobody asked for."""
    owner = run.live.model.get_submodule("base_model.model.model.language_model")
    copy = ModulesToSaveWrapper(owner.norm, "default")
    copy.modules_to_save.requires_grad_(False)
    return changed(owner, "norm", copy)


LORA_FAULTS: dict[str, tuple[Fault, set[str]]] = {
    "an adapter is missing": (without_one, {"lora.targets", "parts.language", "stepped parameters"}),
    "an adapter in the vision tower": (in_the_tower, {"lora.targets", "parts.vision", "stepped parameters"}),
    "another rank": (setting("r", 8), {"lora.rank"}),
    "another alpha": (setting("lora_alpha", 16.0), {"lora.alpha"}),
    "another scale": (setting("scaling", 2.0), {"lora scale"}),
    "no dropout": (setting("lora_dropout", nn.Identity()), {"lora.dropout"}),
    "adapters of an earlier run": (trained_before, {"lora.init"}),
    "adapters in bf16": (bf16_adapters, {"lora.dtype", "levers.optimizer"}),
    "switched off": (
        lambda run: changed(adapters(run)[0][1], "_disable_adapters", True),
        {"adapters in effect"},
    ),
    "whole copies": (copied_head, {"lora.modules_to_save", "parts.language"}),
    "the head gives logits": (
        lambda run: changed(run.live.model.get_submodule("base_model.model"), "lm_head", _frozen(nn.Linear(2, 2))),
        {"levers.loss", "parts.head"},
    ),
    "logits' loss": (lambda run: changed(run.live.trainer, "compute_loss_func", causal_loss), {"levers.loss"}),
}


@pytest.mark.long
@pytest.mark.parametrize("name", LORA_FAULTS)
def test_a_fault_in_adapters_turns_its_lever_red(lora: Begin, name: str) -> None:
    began = failed(lora.before())  # B has moved where steps were taken before
    assert began <= {"lora.init"}
    fault, wanted = LORA_FAULTS[name]
    with fault(lora):
        assert failed(lora.before()) - began == wanted - began


# ---- faults that only steps show -----------------------------------------------------------------------------------


@contextlib.contextmanager
def checkpointed(run: Begin, modes: dict[str, str]) -> Iterator[None]:
    set_checkpointing(run.live.model, run.live.part_of, modes)
    try:
        yield
    finally:
        set_checkpointing(run.live.model, run.live.part_of, checkpointing_modes(run.plan.recipe))


@contextlib.contextmanager
def hooked(run: Begin, path: str, hook: Callable[..., Any]) -> Iterator[None]:
    handle = run.live.model.get_submodule(path).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def attention(path: str, value: str) -> Fault:
    return lambda run: changed(run.live.model.get_submodule(path).config, "_attn_implementation", value)


def keeping_logits(run: Begin) -> Any:
    """A second loss over full logits beside the chunked one."""
    right: Any = run.live.trainer.compute_loss_func
    head = next(m for m in run.live.model.modules() if isinstance(m, DeferredHead))

    def both(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = nn.functional.linear(outputs.logits, head.weight)
        return right(outputs, labels, num_items_in_batch) + 0.0 * logits.float().logsumexp(-1).sum()

    return changed(run.live.trainer, "compute_loss_func", both)


LANGUAGE, VISION = "levers.checkpointing (language)", "levers.checkpointing (vision)"
AFTER_FAULTS: dict[str, tuple[str, Fault, set[str]]] = {
    "vision not checkpointed": ("full", lambda run: checkpointed(run, {"language": "full"}), {VISION}),
    "every other layer": ("full", lambda run: checkpointed(run, {"vision": "full", "language": "every-2"}), {LANGUAGE}),
    "selective for full": (
        "full",
        lambda run: checkpointed(run, {"vision": "full", "language": "selective"}),
        {LANGUAGE},
    ),
    "full for selective": (
        "lora",
        lambda run: checkpointed(run, {"vision": "full", "language": "full"}),
        {LANGUAGE},
    ),
    "eager in language": ("full", attention("model.language_model", "eager"), {"levers.attention (language)"}),
    "eager in vision": ("full", attention("model.vision_tower", "eager"), {"levers.attention (vision)"}),
    "frozen tower with a graph": (
        "lora",
        lambda run: hooked(
            run, "base_model.model.model.visual.patch_embed", lambda m, i, out: out.requires_grad_(True)
        ),
        {"graph of frozen parts"},
    ),
    "dead connector": (
        "full",
        lambda run: hooked(run, "model.merger", lambda m, i, out: [each.detach() for each in out]),
        {"dead parameters", VISION},  # whose blocks have a graph that backward never comes to
    ),
    "no autocast": (
        "full",
        lambda run: changed(run.live.model, "forward", run.live.model._original_forward),
        {
            "levers.autocast",
            *(f"levers.precision ({part} computes)" for part in ("vision", "connector", "language", "head")),
        },
    ),
    "logits kept": ("lora", keeping_logits, {"logits for backward"}),
}


@pytest.mark.long
@pytest.mark.parametrize("name", AFTER_FAULTS)
def test_a_fault_that_steps_show_turns_its_lever_red(request: pytest.FixtureRequest, name: str) -> None:
    kind, fault, wanted = AFTER_FAULTS[name]
    run: Begin = request.getfixturevalue(kind)
    with fault(run):
        assert failed(run.after(1)) == wanted


@pytest.mark.long
def test_states_and_rates_are_read_where_they_are(full: Begin) -> None:
    """Moments in bf16, and a second scheduler that writes into the groups."""
    full.steps(1)
    inner = innermost(full.live.trainer.optimizer)
    state = next(state for state in inner.state.values() if state)
    with item(state, "exp_avg", state["exp_avg"].bfloat16()), item(inner.param_groups[0], "lr", 1.0):
        found = failed(after_without_steps(full))
    assert found >= {"optimizer states", "learning rate in force"}


def after_without_steps(run: Begin) -> Any:
    return read_after_steps(run.live, run.plan, Seen(), run.facts)


@pytest.mark.long
def test_gradients_in_another_dtype_are_seen(lora: Begin) -> None:
    with bf16_adapters(lora):
        seen = lora.steps(1, steps=False)
    found = {
        reading.lever: reading.ok for reading in learning_reader.read(lora.live, Asked(lora.plan, lora.facts), seen)
    }
    assert found["gradients' dtype"] is False


FLIPS: dict[str, dict[str, Any]] = {
    "levers": {
        "precision": "pure-bf16",
        "autocast": False,
        "optimizer": "adamw-foreach",
        "checkpointing": "none",
        "loss": "chunked",
        "attention": "eager",
        "linear_attention": "fla",
        "parallel": "ddp",
        "offload": "optimizer",
        "activation_offload": True,
        "micro_batch": 1,
        "packing": True,
    },
    "schedule": {
        "learning_rate": 2e-5,
        "warmup": 0.5,
        "kind": "constant",
        "weight_decay": 0.0,
        "betas": (0.9, 0.99),
        "clip": 0.5,
    },
    "loader": {"workers": 3, "pin": True},
    "run": {"keep": 7},
    "image": {"max_slices": 1},
    "": {"batch": 8, "seed": 3, "max_length": 30, "parts": {"vision": "frozen"}},
}


@pytest.mark.long
def test_any_lever_flipped_in_the_plan_is_caught(full: Begin) -> None:
    """The live objects stay as they are, what is asked changes: each flip fails at least one check."""
    seen, missed = full.steps(1), []
    for section, values in FLIPS.items():
        for key, value in values.items():
            recipe = full.plan.recipe
            if section:
                part = dataclasses.replace(getattr(recipe, section), **{key: value})
                recipe = dataclasses.replace(recipe, **{section: part})
            else:
                recipe = dataclasses.replace(recipe, **{key: value})
            plan = dataclasses.replace(full.plan, recipe=recipe)
            found = (*read_back(full.live, plan, full.facts), *read_after_steps(full.live, plan, seen, full.facts))
            if not failed(found):
                missed.append(f"{section}.{key}")
    assert not missed


# ---- ranks ---------------------------------------------------------------------------------------------------------


def reading(found: str, ok: bool | None = True, same: bool = True) -> Reading:
    return Reading("seed", "0", found, ok, "evidence", "fix", same)


def test_one_rank_that_differs_is_named() -> None:
    (check,) = joined([[reading("0")], [reading("0")], [reading("7", ok=False)]])
    assert (check.ok, check.found) == (False, "7")
    assert check.evidence.startswith("rank 2 only")
    (check,) = joined([[reading("0", ok=False)], [reading("0", ok=False)]])
    assert check.evidence.startswith("every rank")


def test_ranks_that_find_unlike_things_fail_though_each_is_right() -> None:
    (check,) = joined([[reading("0", ok=None)], [reading("1", ok=None)]])
    assert (check.ok, check.found) == (False, "rank 0: 0; rank 1: 1")
    (check,) = joined([[reading("0", same=False)], [reading("1", same=False)]])
    assert check.ok is True


def test_a_lever_that_only_one_rank_has_fails() -> None:
    checks = list(joined([[reading("0")], []]))
    assert [check.ok for check in checks] == [False]
    assert "only on rank 0" in checks[0].evidence


def test_a_reader_that_meets_strange_objects_is_a_finding() -> None:
    def breaks() -> Any:
        raise AttributeError("no such thing")

    (found,) = tried([("engine", breaks)])
    assert found.ok is False
    assert "no such thing" in found.evidence
    assert set(BEFORE) >= {"parameters", "engine", "data"}

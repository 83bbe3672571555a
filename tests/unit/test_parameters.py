"""What is counted equals what transformers and PEFT build, part by part and byte by byte."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch.nn.parallel import DistributedDataParallel

from memfit.build.adapters import add_adapters, is_adapter
from memfit.build.freeze import set_dtypes, set_learning, trainable_by_part
from memfit.catalog.gpus import parse_hardware
from memfit.catalog.optimizers import OPTIMIZERS
from memfit.catalog.precisions import PRECISIONS
from memfit.errors import UserError
from memfit.families import family_for
from memfit.families.base import Family
from memfit.planner.estimate import estimate_states
from memfit.planner.parts import ResolvedParts, parameter_groups, resolve_parts
from memfit.specs.profile import Profile
from memfit.specs.recipe import Levers, Lora, Recipe
from memfit.testing import KINDS, make_dummy
from memfit.trace.parameters import profile_of, read_profile

VISION_KINDS = ("minicpmv4_6", "minicpmv4_7", "qwen2_5_vl", "llava")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module")
def dummies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], Family, Profile]]:
    """kind -> (config, family, profile read from the meta device)."""
    found = {}
    for kind in KINDS:
        folder = make_dummy(kind, tmp_path_factory.mktemp("dummies") / kind)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        family = family_for(config)
        found[kind] = (config, family, read_profile(config, family))
    return found


def real_model(config: dict[str, Any], family: Family, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    values = {key: value for key, value in config.items() if key != "model_type"}
    loaded = transformers.AutoConfig.for_model(config["model_type"], **values)
    return getattr(transformers, family.auto_class).from_config(loaded, dtype=dtype)


def base_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")


def counted(model: torch.nn.Module, family: Family) -> tuple[Counter[str], Counter[str]]:
    """Live parameters by part: those that learn, those that do not. Tied ones once, as torch counts them."""
    learning: Counter[str] = Counter()
    frozen: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        (learning if parameter.requires_grad else frozen)[family.part_of(base_name(name))] += parameter.numel()
    return learning, frozen


def forecast_counts(resolved: ResolvedParts, profile: Profile, lora: Lora) -> tuple[Counter[str], Counter[str]]:
    groups = parameter_groups(profile, resolved, lora)
    return (
        Counter({group.part: group.trainable_numel for group in groups if group.trainable_numel}),
        Counter({group.part: group.frozen_numel for group in groups if group.frozen_numel}),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_profile_is_the_real_model(kind: str, dummies: Any) -> None:
    config, family, profile = dummies[kind]
    model = real_model(config, family)
    named = dict(model.named_parameters(remove_duplicate=False))
    assert {row.name: row.shape for row in profile.parameters} == {n: tuple(p.shape) for n, p in named.items()}
    assert sum(profile.part_numel().values()) == sum(p.numel() for p in model.parameters())
    for row in profile.parameters:
        if row.tied_to:
            assert named[row.name] is named[row.tied_to]
    tied = bool(config.get("tie_word_embeddings"))
    assert any(row.tied_to for row in profile.parameters) == tied
    assert profile.buffers_bytes == sum(b.numel() * b.element_size() for b in model.buffers())
    kinds = {row.module: row.kind for row in profile.parameters}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert kinds[name] == "linear"
        if isinstance(module, torch.nn.Embedding):
            assert kinds[name] == "embedding"


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_numbered(kind: str, dummies: Any) -> None:
    config, _, profile = dummies[kind]
    depth = {"language": config.get("text_config", config)["num_hidden_layers"]}
    vision = config.get("vision_config")
    if vision:
        depth["vision"] = vision.get("num_hidden_layers", vision.get("depth"))
    for part, blocks in depth.items():
        assert {row.block for row in profile.parameters if row.part == part} - {None} == set(range(blocks))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["lora", "dora", "rslora"])
def test_auto_targets_equal_peft(kind: str, variant: str, dummies: Any) -> None:
    config, family, profile = dummies[kind]
    lora = Lora(rank=4, variant=variant)  # type: ignore[arg-type]
    resolved = resolve_parts(Recipe(model="m", method="lora", lora=lora), family, profile)
    model = real_model(config, family)
    inside = "model.language_model" if kind in VISION_KINDS else "model"
    pattern = rf"{inside}\..*\.({'|'.join(family.lora_targets)})"
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(r=4, target_modules=pattern, use_dora=variant == "dora", use_rslora=variant == "rslora"),
    )
    assert forecast_counts(resolved, profile, lora) == counted(adapted, family)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_all_linear_equals_pefts_own_shorthand(kind: str, dummies: Any) -> None:
    config, family, profile = dummies[kind]
    lora = Lora(rank=3, targets="all-linear")
    resolved = resolve_parts(Recipe(model="m", method="lora", lora=lora), family, profile)
    adapted = peft.get_peft_model(
        real_model(config, family), peft.LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    assert forecast_counts(resolved, profile, lora) == counted(adapted, family)


@pytest.mark.parametrize("kind", VISION_KINDS)
def test_all_linear_in_vision_and_language(kind: str, dummies: Any) -> None:
    config, family, profile = dummies[kind]
    lora = Lora(rank=2, targets="all-linear")
    parts: Any = {"vision": "lora", "connector": "full"}
    resolved = resolve_parts(Recipe(model="m", method="lora", lora=lora, parts=parts), family, profile)
    model = real_model(config, family)
    unreached = family.unreached(config) if family.unreached else ()
    wanted = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and family.part_of(f"{name}.weight") in {"vision", "language"}
        and not name.startswith(unreached)
    ]
    assert sorted(resolved.lora_modules) == sorted(wanted)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=wanted))
    for name, parameter in adapted.named_parameters():
        if family.part_of(base_name(name)) == "connector":
            parameter.requires_grad_(True)
    assert forecast_counts(resolved, profile, lora) == counted(adapted, family)


@pytest.mark.parametrize(("kind", "variant"), [("llama", "lora"), ("qwen3", "dora"), ("minicpmv4_6", "lora")])
def test_listed_targets_and_embeddings(kind: str, variant: str, dummies: Any) -> None:
    config, family, profile = dummies[kind]
    lora = Lora(rank=5, targets=("self_attn.q_proj", "embed_tokens"), variant=variant)  # type: ignore[arg-type]
    resolved = resolve_parts(Recipe(model="m", method="lora", lora=lora), family, profile)
    adapted = peft.get_peft_model(
        real_model(config, family),
        peft.LoraConfig(r=5, target_modules=["self_attn.q_proj", "embed_tokens"], use_dora=variant == "dora")
        if kind != "minicpmv4_6"
        else peft.LoraConfig(r=5, target_modules=r"model\.language_model\..*(self_attn\.q_proj|embed_tokens)"),
    )
    assert forecast_counts(resolved, profile, lora) == counted(adapted, family)


@pytest.mark.parametrize(
    ("kind", "saved"),
    [
        ("llama", ("lm_head",)),
        ("qwen3", ("embed_tokens",)),
        ("qwen3", ("lm_head", "embed_tokens")),
        ("minicpmv4_6", ("model.merger", "embed_tokens")),
        ("llava", ("multi_modal_projector", "mlp")),
    ],
)
def test_modules_to_save_are_full_copies(kind: str, saved: tuple[str, ...], dummies: Any) -> None:
    config, family, profile = dummies[kind]
    lora = Lora(rank=4, modules_to_save=saved)
    resolved = resolve_parts(Recipe(model="m", method="lora", lora=lora), family, profile)
    adapted = peft.get_peft_model(
        real_model(config, family),
        peft.LoraConfig(r=4, target_modules=list(resolved.lora_modules), modules_to_save=list(saved)),
    )
    learning, frozen = Counter[str](), Counter[str]()
    for name, parameter in adapted.named_parameters():
        part = family.part_of(base_name(name).replace(".modules_to_save.default", ""))
        (learning if parameter.requires_grad else frozen)[part] += parameter.numel()
    assert forecast_counts(resolved, profile, lora) == (learning, frozen)


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("llama", {}),
        ("qwen3", {"language": "last-1"}),
        ("minicpmv4_6", {"vision": "frozen", "language": "last-1"}),
        ("qwen2_5_vl", {"vision": "last-1", "language": "frozen", "head": "full"}),
        ("llava", {"vision": "frozen", "language": "frozen", "head": "frozen"}),
    ],
)
def test_full_and_last_n_equal_a_model_frozen_by_name(kind: str, parts: Any, dummies: Any) -> None:
    config, family, profile = dummies[kind]
    resolved = resolve_parts(Recipe(model="m", parts=parts), family, profile)
    model = real_model(config, family)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(resolved.learns(name))
    assert forecast_counts(resolved, profile, Lora()) == counted(model, family)
    last = {part for part, mode in parts.items() if mode == "last-1"}
    for part in last:
        final = max(
            int(n.removeprefix(family.blocks[part]).split(".")[0]) for n in names_of(model, family.blocks[part])
        )
        assert {n for n in resolved.learning if family.part_of(n) == part} == {
            n for n in names_of(model, family.blocks[part]) if n.startswith(f"{family.blocks[part]}{final}.")
        }


def names_of(model: torch.nn.Module, prefix: str) -> list[str]:
    return [name for name, _ in model.named_parameters() if name.startswith(prefix)]


def step_once(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state tensors after one step."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def real_optimizer(name: str, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    arguments = transformers.TrainingArguments(optim=OPTIMIZERS[name].engine_name, use_cpu=True, report_to=[])
    kind, values = transformers.Trainer.get_optimizer_cls_and_kwargs(arguments)
    return kind(parameters, **values)


@pytest.mark.parametrize("optimizer", [name for name, row in OPTIMIZERS.items() if row.runs_today and not row.package])
@pytest.mark.parametrize(
    ("precision", "learning", "frozen"),
    [("fp32", "fp32", "fp32"), ("bf16-amp", "fp32", "bf16"), ("pure-bf16", "bf16", "bf16")],
)
def test_states_equal_live_tensors(optimizer: str, precision: str, learning: str, frozen: str, dummies: Any) -> None:
    """Weights, gradients and the states of the optimizers that transformers itself makes, to the byte."""
    config, family, profile = dummies["qwen2_5_vl"]
    recipe = Recipe(
        model="m",
        method="lora",
        parts={"connector": "full", "vision": "last-1"},
        lora=Lora(rank=4, modules_to_save=("lm_head",)),
        levers=Levers(precision=precision, optimizer=optimizer),  # type: ignore[arg-type]
    )
    forecast = estimate_states(recipe, profile, family, parse_hardware("1xcpu"))
    resolved = resolve_parts(recipe, family, profile)
    model = peft.get_peft_model(
        real_model(config, family),
        peft.LoraConfig(r=4, target_modules=list(resolved.lora_modules), modules_to_save=["lm_head"]),
        autocast_adapter_dtype=False,
    )
    for name, parameter in model.named_parameters():
        if resolved.learns(base_name(name)):
            parameter.requires_grad_(True)
        is_adapter = "lora_" in name
        wanted = "fp32" if is_adapter else (learning if parameter.requires_grad else frozen)
        parameter.data = parameter.data.to(DTYPES[wanted])

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kinds: Counter[str] = Counter()
    for term in forecast.ledger.terms:
        kinds[next(piece for piece in term.id.split(".") if piece not in {"adapter", "saved"})] += term.bytes
    assert kinds["weights"] == sum(p.numel() * p.element_size() for p in model.parameters())
    assert kinds["gradients"] == sum(p.numel() * p.element_size() for p in trained)
    assert kinds["optimizer"] == step_once(model, real_optimizer(optimizer, trained))
    assert kinds["buffers"] == sum(b.numel() * b.element_size() for b in model.buffers())


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("qwen3", {}),
        ("minicpmv4_6", {"parts": {"vision": "frozen", "language": "last-1"}}),
        ("llava", {"method": "lora", "parts": {"connector": "full"}}),
        ("minicpmv4_7", {"method": "lora", "parts": {"vision": "lora"}, "lora": Lora(rank=2, targets="all-linear")}),
    ],
)
def test_forecast_equals_what_memfit_builds(kind: str, keys: Any, dummies: Any) -> None:
    """The steps of `build.build` on a real model: the same parameters learn, with the same bytes."""
    config, family, profile = dummies[kind]
    forecast = estimate_states(Recipe(model="m", **keys), profile, family, parse_hardware("1xA100-80G"))
    recipe = forecast.recipe
    resolved = resolve_parts(recipe, family, profile)
    model = real_model(config, family)
    if resolved.lora_modules:
        model = add_adapters(model, recipe.lora, resolved.lora_modules)
    set_learning(model, lambda name: is_adapter(name) or base_name(name) in resolved.learning)
    precision = PRECISIONS[recipe.levers.precision]
    idle = {name for name, _ in model.named_parameters() if base_name(name) in resolved.idle}
    set_dtypes(model, precision.learning, precision.frozen, keep=is_adapter, idle=idle)
    assert trainable_by_part(model, lambda name: family.part_of(base_name(name))) == {
        part: count for part, count in forecast.trainable.items() if count
    }
    weights = sum(term.bytes for term in forecast.ledger.terms if "weights" in term.id.split("."))
    assert weights == sum(p.numel() * p.element_size() for p in model.parameters())


def test_gpt2_layers_are_linear_with_turned_weights() -> None:
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 32}
    family = family_for(config)
    profile = read_profile(config, family)
    lora = Lora(rank=4, variant="dora")
    resolved = resolve_parts(Recipe(model="m", method="lora", lora=lora), family, profile)
    adapted = peft.get_peft_model(
        real_model(config, family),
        peft.LoraConfig(r=4, target_modules=list(family.lora_targets), use_dora=True, fan_in_fan_out=True),
    )
    assert forecast_counts(resolved, profile, lora) == counted(adapted, family)


def test_profile_comes_from_the_cache_the_second_time(
    tmp_path: Path, dummies: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, family, profile = dummies["llama"]
    assert profile_of(config, family, tmp_path) == profile
    monkeypatch.setattr("memfit.trace.parameters.read_profile", lambda *_: pytest.fail("read again"))
    assert profile_of(config, family, tmp_path) == profile


def test_a_refused_config_is_a_user_error(dummies: Any) -> None:
    config, family, _ = dummies["llama"]
    with pytest.raises(UserError, match="hidden_size"):
        read_profile({**config, "hidden_size": "wide"}, family)


def test_upstream_facts_that_the_rows_rely_on() -> None:
    """An upgrade that moves one of these changes bytes: see the rows' sources."""
    ddp = inspect.signature(DistributedDataParallel.__init__).parameters
    assert ddp["gradient_as_bucket_view"].default is False
    assert inspect.signature(torch.optim.SGD.__init__).parameters["momentum"].default == 0
    assert inspect.signature(transformers.optimization.Adafactor.__init__).parameters["beta1"].default is None
    assert (
        inspect.signature(transformers.BitsAndBytesConfig.__init__).parameters["bnb_4bit_use_double_quant"].default
        is False
    )
    names = {name.value for name in transformers.training_args.OptimizerNames}
    assert {row.engine_name for row in OPTIMIZERS.values()} <= names


def test_foreach_holds_one_copy_of_the_second_moments() -> None:
    """The multi-tensor step makes the square roots of all second moments at once, and nothing else of that size."""
    from torch.utils._python_dispatch import TorchDispatchMode

    size = 4096
    live = {"bytes": 0, "peak": 0}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            if function is torch.ops.aten._foreach_sqrt.default:
                live["peak"] += sum(t.numel() * t.element_size() for t in out)
            return out

    parameters = [torch.nn.Parameter(torch.ones(size)) for _ in range(3)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(parameters, foreach=True)
    with Watch():
        optimizer.step()
    assert live["peak"] == 3 * size * 4


def test_what_gets_no_gradient_keeps_the_dtype_it_was_built_in(dummies: Any) -> None:
    """FSDP2 widens what learns to fp32; LLaVA's last vision block, which the loss never reaches, stays 16 bit."""
    _config, family, profile = dummies["llava"]
    recipe = Recipe(model="m", levers=Levers(parallel="fsdp", precision="bf16-mixed"))
    forecast = estimate_states(recipe, profile, family, parse_hardware("2xA100-80G"))
    vision = [row for row in profile.parameters if row.part == "vision"]
    halves = [(-(-row.shape[0] // 2) * row.numel // row.shape[0], 4 if row.reached else 2) for row in vision]
    assert {row.reached for row in vision} == {True, False}
    term = next(term for term in forecast.ledger.terms if term.id == "weights.vision")
    assert term.bytes == sum(count * width for count, width in halves)

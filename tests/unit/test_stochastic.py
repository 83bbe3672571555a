"""bf16 weights that learn: rounding by chance, against torch's own AdamW in fp32 and in bf16."""

from __future__ import annotations

import copy

import pytest
import torch

from memfit.engine import stochastic
from memfit.engine.stochastic import StochasticAdamW, lost_steps, put
from memfit.specs.recipe import Levers, Recipe


def bits(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rounding_goes_to_either_neighbour_by_its_share(sign: float) -> None:
    """Between 1 and 1 + 1/128, bf16's next number: a quarter of the way goes up one time in four."""
    value = sign * (1 + 0.25 / 128)
    target = torch.empty(400_000, dtype=torch.bfloat16)
    put(target, torch.full((400_000,), value), bits())
    assert set(target.unique().tolist()) == {sign, sign * (1 + 1 / 128)}
    share = float((target != sign).float().mean())
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / 400_000) ** 0.5
    nearest = torch.full((8,), value).bfloat16()
    assert float(nearest[0]) == sign  # what is lost without it


def test_what_bf16_holds_stays_as_it_is() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -3.5, 2.0**-126, 1e38, float("inf"), -float("inf")]).bfloat16()
    target = torch.empty_like(values)
    for seed in range(20):
        put(target, values.float(), bits(seed))
        assert torch.equal(target, values)
    put(target[:1], torch.tensor([float("nan")]), bits())
    assert torch.isnan(target[0])


@pytest.mark.parametrize("chunk", [7, 1 << 21])
def test_fp32_parameters_step_as_under_torch(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(stochastic, "CHANCE_CHUNK", chunk)
    torch.manual_seed(0)
    own = [torch.nn.Parameter(torch.randn(5, 6)), torch.nn.Parameter(torch.randn(3).t())]
    others = copy.deepcopy(own)
    values = {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    mine, theirs = StochasticAdamW(own, **values), torch.optim.AdamW(others, fused=True, **values)
    for _ in range(10):
        for one, other in zip(own, others, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        mine.step()
        theirs.step()
    for one, other in zip(own, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
        for name in ("exp_avg", "exp_avg_sq", "step"):
            torch.testing.assert_close(mine.state[one][name], theirs.state[other][name], rtol=1e-6, atol=1e-8)


def test_states_are_those_of_torch_to_the_byte() -> None:
    held = []
    for make in (StochasticAdamW, lambda p: torch.optim.AdamW(p, fused=True)):
        parameter = torch.nn.Parameter(torch.ones(100, 3, dtype=torch.bfloat16))
        optimizer = make([parameter])
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        held.append({name: (value.dtype, value.shape) for name, value in optimizer.state[parameter].items()})
    assert held[0] == held[1]


def learned(dtype: torch.dtype, optimizer: str, seed: int = 0) -> float:
    """The loss left of a least-squares problem whose steps are below what bf16 resolves."""
    torch.manual_seed(seed)
    wanted_ND = torch.rand(64, 32) + 1
    parameter = torch.nn.Parameter(torch.ones(64, 32, dtype=dtype))
    rate = 1e-3  # a step of AdamW is about the rate; half a unit of bf16 above 1 is 1/256
    make = StochasticAdamW if optimizer == "chance" else torch.optim.AdamW
    made = make([parameter], lr=rate, weight_decay=0.0)
    for _ in range(1500):
        parameter.grad = (parameter.detach().float() - wanted_ND).to(dtype)
        made.step()
    return float(((parameter.float() - wanted_ND) ** 2).mean())


def test_it_learns_where_rounding_to_nearest_stands_still() -> None:
    begin = learned(torch.bfloat16, "nearest")
    assert begin > 0.3  # (1 / 3 is the variance of the whole problem)
    assert learned(torch.bfloat16, "chance") < 0.05 * begin
    assert learned(torch.float32, "nearest") < 0.05 * begin


def test_replicas_and_resumed_runs_draw_the_same() -> None:
    def steps(count: int, optimizer: StochasticAdamW, parameter: torch.nn.Parameter) -> None:
        for _ in range(count):
            parameter.grad = torch.full_like(parameter, 0.3)
            optimizer.step()

    def make() -> tuple[StochasticAdamW, torch.nn.Parameter]:
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 50, dtype=torch.bfloat16))
        return StochasticAdamW([parameter], lr=1e-3, seed=3), parameter

    one, first = make()
    steps(6, one, first)
    other, second = make()
    steps(3, other, second)
    resumed, third = make()
    third.data.copy_(second.data)
    resumed.load_state_dict(copy.deepcopy(other.state_dict()))
    assert resumed.state[third]["exp_avg"].dtype == torch.bfloat16
    steps(3, resumed, third)
    assert torch.equal(first, third)


@pytest.mark.parametrize(
    ("optimizer", "precision", "dtype", "told"),
    [
        ("adamw-foreach", "pure-bf16", torch.bfloat16, True),
        ("sgd", "pure-bf16", torch.bfloat16, True),
        ("adamw", "pure-bf16", torch.bfloat16, False),
        ("adamw-foreach", "pure-bf16", torch.float32, False),  # adapters in fp32 lose nothing
        ("adamw-foreach", "bf16-amp", torch.float32, False),
    ],
)
def test_optimizers_that_round_to_nearest_are_told(
    optimizer: str, precision: str, dtype: torch.dtype, told: bool
) -> None:
    recipe = Recipe(model="m", levers=Levers(optimizer=optimizer, precision=precision))  # type: ignore[arg-type]
    notes = lost_steps(recipe, torch.nn.Linear(3, 2, dtype=dtype))
    assert bool(notes) is told
    assert not told or f"{optimizer} rounds 8 weights to nearest" in notes[0]

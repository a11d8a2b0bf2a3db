"""Statistics against naive loops, and the laws every statistic obeys: batches, merging, relabelling, skipped slots."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moecompress.stats.base import ExpertObservation, LinearObservation, RoutingObservation, State, Statistic, merge
from moecompress.stats.linears import LinearHessian
from moecompress.stats.moments import ExpertHessian, InputMoments
from moecompress.stats.routing import RoutingCounts, TokenSample, row_hash
from moecompress.types import MoESite

E, K, H, W, T = 5, 2, 6, 4, 40
SITE = MoESite("mlp.experts", "mlp.gate", num_experts=E, top_k=K, hidden=H, width=W)

STATISTICS: list[Statistic] = [
    RoutingCounts(),
    TokenSample(7, seed=3),
    TokenSample(1000),
    ExpertHessian("gate_up"),
    ExpertHessian("down"),
    ExpertHessian("gate_up", "affinity"),
    ExpertHessian("down", "affinity", 2),
    ExpertHessian("gate_up", paired=True),
    ExpertHessian("down", "affinity", paired=True, pooled=False),
    InputMoments(),
]
IDS = [f"{s.name}{getattr(s, 'n', '')}" for s in STATISTICS]


@dataclasses.dataclass(frozen=True)
class Data:
    """T routed tokens; expert 3 is never chosen and about a fifth of the slots are skipped (id E)."""

    hidden: Tensor
    ids: Tensor
    weights: Tensor
    rows: Tensor
    middle: Tensor  # [T, E, W]: what each expert would make of each token
    other_hidden: Tensor  # the same two in the original stream
    other_middle: Tensor

    def take(self, index: Tensor) -> Data:
        return Data(*(getattr(self, field.name)[index] for field in dataclasses.fields(self)))


def _data(seed: int = 0) -> Data:
    generator = torch.Generator().manual_seed(seed)
    chance = torch.tensor([3.0, 2.0, 1.0, 0.0, 1.0, 1.5]).expand(T, E + 1)
    return Data(
        torch.randn(T, H, generator=generator),
        torch.multinomial(chance, K, generator=generator),
        torch.rand(T, K, generator=generator),
        torch.randperm(1000, generator=generator)[:T],
        torch.randn(T, E, W, generator=generator),
        torch.randn(T, H, generator=generator),
        torch.randn(T, E, W, generator=generator),
    )


def _observe(statistic: Statistic, state: State, data: Data) -> None:
    statistic.observe_routing(state, RoutingObservation(data.hidden, data.ids, data.weights, None, data.rows))
    for expert in range(E):
        at, slots = (data.ids == expert).nonzero(as_tuple=True)
        if at.numel():
            seen = ExpertObservation(
                expert,
                data.rows[at],
                data.weights[at, slots],
                data.hidden[at],
                data.middle[at, expert],
                torch.zeros(at.numel(), H),
                data.other_hidden[at],
                data.other_middle[at, expert],
            )
            statistic.observe_expert(state, seen)


def _collect(statistic: Statistic, *parts: Data) -> State:
    state = statistic.init(SITE)
    for part in parts:
        _observe(statistic, state, part)
    return state


def _assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("statistic", STATISTICS, ids=IDS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), cuts=st.lists(st.integers(0, T), max_size=4))
def test_batches_and_their_order_do_not_matter(statistic: Statistic, seed: int, cuts: list[int]) -> None:
    data = _data(seed)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(seed))
    edges = sorted({0, T, *cuts})
    parts = [data.take(order[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    _assert_equal(_collect(statistic, data), _collect(statistic, *parts))


@pytest.mark.parametrize("statistic", STATISTICS, ids=IDS)
def test_merging_is_having_seen_both(statistic: Statistic) -> None:
    data = _data(1)
    a, b, c = (data.take(torch.arange(start, T, 3)) for start in range(3))
    sa, sb, sc = (_collect(statistic, part) for part in (a, b, c))
    whole = _collect(statistic, data)
    kept = {key: value.clone() for key, value in sa.items()}
    _assert_equal(merge(statistic, merge(statistic, sa, sb), sc), whole)
    _assert_equal(merge(statistic, sa, merge(statistic, sb, sc)), whole)
    _assert_equal(merge(statistic, merge(statistic, sc, sa), sb), whole)
    _assert_equal(merge(statistic, whole, statistic.init(SITE)), whole)
    _assert_equal(sa, kept)
    _assert_equal(statistic.finalise(merge(statistic, merge(statistic, sb, sa), sc)), statistic.finalise(whole))


@pytest.mark.parametrize("statistic", STATISTICS, ids=IDS)
def test_relabelling_experts_relabels_the_result(statistic: Statistic) -> None:
    data = _data(2)
    new_id = torch.tensor([2, 0, 4, 1, 3, E])  # old label -> new label; the sentinel stays
    old = new_id[:E].argsort()
    relabelled = dataclasses.replace(data, ids=new_id[data.ids], middle=data.middle[:, old])
    relabelled = dataclasses.replace(relabelled, other_middle=data.other_middle[:, old])
    plain, moved = _collect(statistic, data), _collect(statistic, relabelled)
    for key, value in plain.items():
        if key == "ids":
            expected = new_id[value]
        elif value.dim() and value.shape[0] == E:
            expected = value[old]
        else:
            expected = value
        torch.testing.assert_close(moved[key], expected)


@pytest.mark.parametrize("statistic", STATISTICS, ids=IDS)
def test_states_are_static_sorted_and_declared(statistic: Statistic) -> None:
    empty, full = statistic.init(SITE), _collect(statistic, _data())
    assert list(empty) == sorted(statistic.reduce) == list(full)
    assert {key: value.dtype for key, value in empty.items()} == {key: value.dtype for key, value in full.items()}
    assert all(torch.isfinite(value).all() for value in statistic.finalise(empty).values())
    assert statistic.depends_on <= {"activations", "attention", "experts", "norms", "router"}
    with pytest.raises(ValueError, match="state keys"):
        merge(statistic, full, {"other": torch.zeros(1)})


def test_names_differ_where_the_numbers_differ() -> None:
    names = {
        ExpertHessian(which, weighting, power).name  # type: ignore[arg-type]
        for which in ("gate_up", "down")
        for weighting, power in (("none", 1), ("affinity", 1), ("affinity", 2))
    }
    assert len(names) == 6
    assert ExpertHessian("down", "none", 2).name == ExpertHessian("down").name


def test_routing_counts_by_loops() -> None:
    data = _data(4)
    state = _collect(RoutingCounts(), data)
    tokens, gates, squares = [0] * E, [0.0] * E, [0.0] * E
    for token in range(T):
        for slot in range(K):
            expert, gate = int(data.ids[token, slot]), float(data.weights[token, slot])
            if expert < E:
                tokens[expert] += 1
                gates[expert] += gate
                squares[expert] += gate * gate
    assert state["tokens"].tolist() == tokens and tokens[3] == 0 < sum(tokens) < T * K
    assert int(state["total"]) == T
    torch.testing.assert_close(state["gate_sum"], torch.tensor(gates, dtype=torch.float64))
    torch.testing.assert_close(state["gate_square"], torch.tensor(squares, dtype=torch.float64))


@pytest.mark.parametrize("which", ["gate_up", "down"])
@pytest.mark.parametrize(("weighting", "power"), [("none", 1), ("affinity", 1), ("affinity", 2)])
def test_hessian_by_loops(which: str, weighting: str, power: int) -> None:
    data = _data(5)
    state = _collect(ExpertHessian(which, weighting, power), data)  # type: ignore[arg-type]
    columns = H if which == "gate_up" else W
    hessian = torch.zeros(E, columns, columns, dtype=torch.float64)
    tokens, weight = [0] * E, [0.0] * E
    for token in range(T):
        for slot in range(K):
            expert = int(data.ids[token, slot])
            if expert == E:
                continue
            x = (data.hidden[token] if which == "gate_up" else data.middle[token, expert]).double()
            c = float(data.weights[token, slot]) ** power if weighting == "affinity" else 1.0
            hessian[expert] += c * torch.outer(x, x)
            tokens[expert] += 1
            weight[expert] += c
    torch.testing.assert_close(state["hessian"].double(), hessian, rtol=1e-5, atol=1e-5)
    assert state["tokens"].tolist() == tokens
    assert state["weight"].tolist() == pytest.approx(weight)


def test_a_weight_of_two_is_seeing_the_token_twice() -> None:
    data, statistic = _data(6), ExpertHessian("gate_up", "affinity")
    once = dataclasses.replace(data, weights=torch.ones(T, K))
    double = _collect(statistic, dataclasses.replace(data, weights=torch.full((T, K), 2.0)))
    twice = _collect(statistic, once, once)
    torch.testing.assert_close(double["hessian"], twice["hessian"])


def test_tokens_of_no_weight_have_no_influence() -> None:
    data, statistic = _data(6), ExpertHessian("down", "affinity")
    silent = torch.arange(T) % 3 == 0
    weights = data.weights.masked_fill(silent[:, None], 0.0)
    other = dataclasses.replace(data, weights=weights, middle=data.middle.clone())
    other.middle[silent] = 1e3
    without = data.take((~silent).nonzero().flatten())
    assert torch.equal(_collect(statistic, other)["hessian"], _collect(statistic, without)["hessian"])


def test_input_moments_by_loops() -> None:
    data = _data(7)
    result = InputMoments().finalise(_collect(InputMoments(), data))
    for expert in range(E):
        at = (data.ids == expert).any(1).nonzero().flatten().tolist()
        assert result["tokens"][expert] == len(at)
        for which, x in (("gate_up", data.hidden), ("down", data.middle[:, expert])):
            for channel in range(x.shape[1]):
                sizes = [abs(float(x[token, channel])) for token in at]
                assert result[f"{which}.abs_max"][expert, channel] == max(sizes, default=0.0)
                assert float(result[f"{which}.abs_sum"][expert, channel]) == pytest.approx(math.fsum(sizes))
                mean = math.fsum(sizes) / max(len(sizes), 1)
                assert float(result[f"{which}.abs_mean"][expert, channel]) == pytest.approx(mean)


def test_the_sample_is_the_declared_one() -> None:
    """Recomputed with Python integers: splitmix64 of the row, the n smallest as signed numbers, ascending by row."""
    mask = (1 << 64) - 1

    def mixed(row: int, seed: int) -> int:
        x = row + (seed + 1) * 0x9E3779B97F4A7C15 & mask
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        x ^= x >> 31
        return x - (1 << 64) if x >> 63 else x

    data = _data(8)
    for seed in (0, 3, 2**40):
        rows = data.rows.tolist()
        assert row_hash(data.rows, seed).tolist() == [mixed(row, seed) for row in rows]
        wanted = sorted(sorted(rows, key=lambda row, seed=seed: mixed(row, seed))[:7])
        state = _collect(TokenSample(7, seed), data)
        assert state["rows"].tolist() == wanted
        at = [rows.index(row) for row in wanted]
        assert torch.equal(state["hidden"], data.hidden[at]) and torch.equal(state["ids"], data.ids[at])
        assert torch.equal(state["weights"], data.weights[at])


def test_the_sample_is_spread_evenly_and_depends_on_the_seed() -> None:
    """1,000 of 100,000 rows: the mean position of a uniform draw has a standard error of 0.009."""
    rows = torch.arange(100_000)
    first, second = (set(torch.argsort(row_hash(rows, seed))[:1000].tolist()) for seed in (0, 1))
    assert abs(sum(first) / 1000 / 100_000 - 0.5) < 0.04
    assert len(first & second) < 40  # 10 expected


def test_low_precision_inputs_are_summed_in_wider_types() -> None:
    data = _data(9)
    low = dataclasses.replace(data, hidden=data.hidden.bfloat16(), weights=data.weights.bfloat16())
    same = dataclasses.replace(data, hidden=low.hidden.float(), weights=low.weights.float())
    for statistic in STATISTICS:
        _assert_equal(_collect(statistic, low), _collect(statistic, same))


def test_an_empty_sample_size_is_refused() -> None:
    with pytest.raises(ValueError, match="n: 0; allowed: at least 1"):
        TokenSample(0)


@pytest.mark.parametrize("weighting", ["none", "affinity"])
@pytest.mark.parametrize("which", ["gate_up", "down"])
def test_a_group_of_experts_is_a_part_of_all(which: str, weighting: str) -> None:
    """Bit for bit: who collects in groups to save memory gets the same matrices, and the same pool of all experts."""
    data = _data(3)
    whole = _collect(ExpertHessian(which, weighting, paired=True), data)  # type: ignore[arg-type]
    for span in ((0, 2), (2, 5)):
        for pooled in (True, False):
            part = _collect(
                ExpertHessian(which, weighting, experts=span, paired=True, pooled=pooled),  # type: ignore[arg-type]
                data,
            )
            assert all(torch.equal(part[key], whole[key][slice(*span)]) for key in ("hessian", "delta"))
            shared = set(part) - {"hessian", "delta"}
            assert all(torch.equal(part[key], whole[key]) for key in shared)
            assert pooled == ("pooled" in shared)
    torch.testing.assert_close(whole["pooled"], whole["hessian"].sum(0))
    torch.testing.assert_close(whole["pooled_delta"], whole["delta"].sum(0))


@pytest.mark.parametrize("which", ["gate_up", "down"])
def test_pairs_against_a_double_loop(which: str) -> None:
    data = _data(4)
    state = _collect(ExpertHessian(which, "affinity", 2, paired=True), data)  # type: ignore[arg-type]
    for expert in range(E):
        wanted = torch.zeros_like(state["delta"][expert], dtype=torch.float64)
        for token in range(T):
            for slot in range(K):
                if int(data.ids[token, slot]) == expert:
                    x = data.hidden[token] if which == "gate_up" else data.middle[token, expert]
                    y = data.other_hidden[token] if which == "gate_up" else data.other_middle[token, expert]
                    wanted += float(data.weights[token, slot]) ** 2 * torch.outer(y - x, x).double()
        torch.testing.assert_close(state["delta"][expert].double(), wanted, rtol=1e-4, atol=1e-5)


def test_state_bytes_are_what_a_state_takes() -> None:
    for statistic in (RoutingCounts(), ExpertHessian("gate_up", paired=True), ExpertHessian("down", experts=(1, 3))):
        assert statistic.state_bytes(SITE) == sum(value.nbytes for value in statistic.init(SITE).values())
    full = _collect(TokenSample(7), _data())
    assert TokenSample(7).state_bytes(SITE) == sum(value.nbytes for value in full.values())


def test_linears_with_the_same_input_share_one_sum() -> None:
    statistic = LinearHessian((("q.weight", 3), ("k.weight", 3), ("o.weight", 2)))
    x, y = torch.randn(8, 3), torch.randn(8, 2)
    state = statistic.init(None)
    for rows in (slice(0, 5), slice(5, 8)):
        statistic.observe_linear(state, LinearObservation("q.weight", x[rows], None))
        statistic.observe_linear(state, LinearObservation("k.weight", x[rows], "q.weight"))
        statistic.observe_linear(state, LinearObservation("o.weight", y[rows], None))
        statistic.observe_linear(state, LinearObservation("other.weight", y[rows], None))
    assert state["k.weight"] is state["q.weight"] and sorted(state) == ["k.weight", "o.weight", "q.weight"]
    torch.testing.assert_close(state["q.weight"], x.t() @ x)
    torch.testing.assert_close(state["o.weight"], y.t() @ y)

"""The model against an oracle that is slow, plain and shares no code with it; then what strategies rely on."""

import math
import weakref
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from batches import make
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import sandbox.model
from sandbox.batch import IGNORED, Batch
from sandbox.config import Model
from sandbox.model import Transformer, attention, build, initial, loss_sum
from sandbox.model.dropout import Dropout, kept

pytestmark = pytest.mark.unit

SMALL = Model(layers=2, width=16, heads=4, hidden=20, vocab=11, init="rough")
RICH = SMALL.model_copy(update={"kv_heads": 2, "norm": "layer", "mlp": "gelu", "bias": True, "qk_norm": True})
CONFIGS = {
    "rms swiglu": SMALL,
    "layer gelu bias gqa qk_norm": RICH,
    "tied, multi-query": SMALL.model_copy(update={"tied": True, "kv_heads": 1}),
    "no rotary, swiglu with bias": SMALL.model_copy(update={"rotary": False, "bias": True}),
    "layer without bias, padded vocabulary": SMALL.model_copy(update={"norm": "layer", "vocab_multiple": 4}),
}


def ready(config: Model, dtype: torch.dtype = torch.float64, seed: int = 0) -> Transformer:
    model = Transformer(config, dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial(name, parameter.shape, config, seed, parameter.dtype))
    return model


PLAIN, PACKED, PADDED = make([7], [7]), make([3, 4], [7], [1, 1, 5]), make([7], [4], [2, 3])
CHUNK = make([3, 4]).take_columns(torch.tensor([0, 1, 5, 6]))  # positions 0 to 3, as of one document, but of two


def gradients(model: Transformer, batch: Batch) -> dict[str, Tensor]:
    loss = loss_sum(model(batch), batch.targets)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def oracle(p: dict[str, Tensor], config: Model, batch: Batch) -> Tensor:
    """Logits, token by token and head by head."""
    width, half = config.width // config.heads, config.width // config.heads // 2

    def linear(x: Tensor, name: str) -> Tensor:
        return (p[f"{name}.weight"] * x).sum(-1) + p.get(f"{name}.bias", 0.0)

    def norm(x: Tensor, name: str) -> Tensor:
        if config.norm == "rms":
            return x / (x.square().mean() + 1e-6).sqrt() * p[f"{name}.weight"]
        x = x - x.mean()
        return x / (x.square().mean() + 1e-5).sqrt() * p[f"{name}.weight"] + p.get(f"{name}.bias", 0.0)

    def head(x: Tensor, name: str, index: int, position: int) -> Tensor:
        x = linear(x, name)[index * width : (index + 1) * width]
        if config.qk_norm:
            x = norm(x, f"{name}_norm")
        if not config.rotary:
            return x
        turn = torch.tensor([position * 10_000 ** (-2 * pair / width) for pair in range(half)], dtype=torch.float64)
        z = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(turn), turn)
        return torch.cat((z.real, z.imag))

    def mlp(x: Tensor, name: str) -> Tensor:
        up = linear(x, f"{name}.up")
        if config.mlp == "gelu":
            return linear(up * (1 + torch.erf(up / math.sqrt(2))) / 2, f"{name}.down")
        gate = linear(x, f"{name}.gate")
        return linear(gate / (1 + torch.exp(-gate)) * up, f"{name}.down")

    def attend(normed: list[Tensor], positions: list[int], documents: list[int], at: int, name: str) -> Tensor:
        seen = [j for j, place in enumerate(positions) if documents[j] == documents[at] and place <= positions[at]]
        parts = []
        for index in range(config.heads):
            group = index * config.groups // config.heads
            query = head(normed[at], f"{name}.q", index, positions[at])
            keys = torch.stack([head(normed[j], f"{name}.k", group, positions[j]) for j in seen])
            values = torch.stack([linear(normed[j], f"{name}.v")[group * width : (group + 1) * width] for j in seen])
            weight = torch.exp(keys @ query / math.sqrt(width))
            parts.append(weight @ values / weight.sum())
        return linear(torch.cat(parts), f"{name}.o")

    rows = []
    for row in range(len(batch.rows)):
        positions, documents = batch.positions[row].tolist(), batch.documents[row].tolist()
        stream = [p["embed.weight"][token] for token in batch.tokens[row].tolist()]
        for layer in range(config.layers):
            name = f"blocks.{layer}"
            normed = [norm(x, f"{name}.norm1") for x in stream]
            stream = [x + attend(normed, positions, documents, at, f"{name}.attention") for at, x in enumerate(stream)]
            stream = [x + mlp(norm(x, f"{name}.norm2"), f"{name}.mlp") for x in stream]
        out = p["embed.weight"] if config.tied else p["head.weight"]
        rows.append(torch.stack([out @ norm(x, "norm") for x in stream]))
    return torch.stack(rows)


@pytest.mark.parametrize("batch", [PLAIN, PACKED, PADDED, CHUNK], ids=["plain", "packed", "padded", "chunk"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_and_gradients_are_those_of_the_oracle(config: Model, batch: Batch) -> None:
    model = ready(config)
    named = dict(model.named_parameters())
    expected = oracle(named, config, batch)
    torch.testing.assert_close(model(batch), expected, rtol=0, atol=1e-12)
    loss = -expected.log_softmax(-1).gather(2, batch.targets.clamp(min=0)[..., None])[batch.targets != IGNORED].sum()
    wanted = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    torch.testing.assert_close(gradients(model, batch), wanted, rtol=0, atol=1e-11)
    # A key's bias shifts all scores of a query alike, and softmax does not see it, unless the key is turned or normed.
    blind = "k.bias" if not (config.rotary or config.qk_norm) else "none"
    assert all(g.abs().max() > 1e-4 for name, g in wanted.items() if not name.endswith(blind)), "must show a mistake"


def test_gradients_are_those_of_finite_differences() -> None:
    config = RICH.model_copy(update={"layers": 1, "width": 8, "heads": 2, "kv_heads": 1, "hidden": 3})
    model, batch = ready(config), make([2, 2], [3])
    names, values = zip(*model.named_parameters(), strict=True)

    def loss(*parameters: Tensor) -> Tensor:
        logits = functional_call(model, dict(zip(names, parameters, strict=True)), (batch,))
        return loss_sum(logits, batch.targets)

    assert torch.autograd.gradcheck(loss, values, fast_mode=True)


def test_packed_documents_equal_the_same_documents_alone() -> None:
    model = ready(RICH)
    whole, at = model(PACKED)[0], 0
    for length in (3, 4):
        alone = make([length])
        alone = replace(alone, tokens=PACKED.tokens[:1, at : at + length])
        torch.testing.assert_close(whole[at : at + length], model(alone)[0], rtol=0, atol=1e-13)
        at += length


def test_padding_changes_nothing_and_is_no_nan() -> None:
    model = ready(RICH)
    padding = PADDED.documents < 0
    other = replace(PADDED, tokens=torch.where(padding, (PADDED.tokens + 1) % 11, PADDED.tokens))
    assert padding.any()
    assert model(PADDED).isfinite().all()
    assert torch.equal(model(PADDED)[~padding], model(other)[~padding])
    torch.testing.assert_close(gradients(model, PADDED), gradients(model, other), rtol=0, atol=1e-14)


@pytest.mark.parametrize("batch", [PLAIN, PACKED, PADDED], ids=["plain", "packed", "padded"])
def test_columns_may_come_in_any_order(batch: Batch) -> None:
    model, order = ready(RICH), torch.tensor([4, 0, 6, 2, 5, 1, 3])
    torch.testing.assert_close(model(batch.take_columns(order)), model(batch)[:, order], rtol=0, atol=1e-13)


def test_grouped_heads_equal_full_heads_with_repeated_keys_and_values() -> None:
    grouped = ready(RICH)
    full = ready(RICH.model_copy(update={"kv_heads": 4}))
    values = dict(grouped.named_parameters())
    with torch.no_grad():
        for name, parameter in full.named_parameters():
            if ".k." in name or ".v." in name:
                heads = values[name].unflatten(0, (2, -1))
                parameter.copy_(heads.repeat_interleave(2, dim=0).flatten(0, 1))
            else:
                parameter.copy_(values[name])
    torch.testing.assert_close(full(PACKED), grouped(PACKED), rtol=0, atol=1e-13)


def test_projections_cut_by_heads_add_up_to_the_whole() -> None:
    whole, x = ready(RICH).blocks["0"].attention, torch.randn(3, 7, 16, dtype=torch.float64)
    total = torch.zeros_like(x)
    for part in range(2):
        cut = ready(RICH).blocks["0"].attention
        for linear in (cut.q, cut.k, cut.v):
            linear.weight = torch.nn.Parameter(linear.weight.chunk(2)[part])
            linear.bias = torch.nn.Parameter(linear.bias.chunk(2)[part])
        cut.o.weight = torch.nn.Parameter(cut.o.weight.chunk(2, dim=1)[part])
        total += cut(x, PACKED) - cut.o.bias
    torch.testing.assert_close(total + whole.o.bias, whole(x, PACKED), rtol=0, atol=1e-13)


def test_stages_of_a_pipeline_compose_to_the_whole() -> None:
    config = RICH.model_copy(update={"dropout": 0.3})
    first, last = ready(config), ready(config)
    first.norm = first.head = last.embed = None
    del first.blocks["1"], last.blocks["0"]
    assert {name.split(".")[1] for name, _ in last.named_parameters() if "blocks" in name} == {"1"}
    assert torch.equal(last(PACKED, first(PACKED)), ready(config)(PACKED))


def test_a_tied_weight_gathers_the_gradients_of_embedding_and_head() -> None:
    tied, free = ready(CONFIGS["tied, multi-query"]), ready(SMALL.model_copy(update={"kv_heads": 1}))
    assert tied.head is not None and tied.embed is not None and free.head is not None and free.embed is not None
    assert tied.head.weight is tied.embed.weight
    free.load_state_dict(tied.state_dict())
    parts = gradients(free, PACKED)
    total = parts["embed.weight"] + parts["head.weight"]
    torch.testing.assert_close(gradients(tied, PACKED)["embed.weight"], total, rtol=0, atol=1e-13)


@pytest.mark.parametrize("config", [SMALL, RICH], ids=["rms", "layer"])
def test_bfloat16_compute_leaves_float32_gradients_near_the_exact_ones(config: Model) -> None:
    model, exact = ready(config, torch.bfloat16), gradients(ready(config), PACKED)
    assert model(PACKED).dtype == torch.bfloat16
    for name, gradient in gradients(model, PACKED).items():
        assert gradient.dtype == torch.float32, name
        error = (gradient - exact[name]).norm() / exact[name].norm()
        assert 1e-6 < error < 0.1, name


def test_bfloat16_weights_handed_in_by_a_strategy_compute_the_same() -> None:
    model = ready(SMALL, torch.bfloat16)
    halves = {name: value.bfloat16() for name, value in model.named_parameters() if "norm" not in name}
    assert torch.equal(functional_call(model, halves, (PACKED,)), model(PACKED))


def test_norms_take_their_statistics_in_float32() -> None:
    layer = ready(SMALL, torch.bfloat16).blocks["0"].norm1
    x = torch.linspace(-3, 5, 16).bfloat16()
    assert torch.equal(layer(x), layer(x.float()).bfloat16())


def test_the_mask_is_worked_out_once_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, rule = [], attention.visible
    monkeypatch.setattr(attention, "visible", lambda *batches: calls.append(1) or rule(*batches))
    model = ready(SMALL)
    batch = make([3, 4])
    assert torch.equal(model(batch), model(batch))
    assert len(calls) == 1
    model(make([7], [7]))
    assert len(calls) == 1, "a plain triangle needs no mask"
    gone = weakref.ref(batch)
    del batch
    assert gone() is None, "a batch must not outlive its step"


# Dropout

DROPPED = RICH.model_copy(update={"dropout": 0.5})
GRID = make(*[[64]] * 32)


def test_dropout_keeps_its_share() -> None:
    for rate in (0.1, 0.5, 0.9):
        mask = kept(GRID, site=1, width=63, rate=rate)
        assert mask.shape == (32, 64, 63)
        deviation = (mask.double().mean() - (1 - rate)) / math.sqrt(rate * (1 - rate) / mask.numel())
        assert abs(deviation) < 4


def test_dropout_is_independent_across_sites_keys_rows_columns_and_features() -> None:
    keys = [replace(GRID, key=key) for key in (0, 1, 2**62)]
    signs = torch.stack([torch.stack([kept(batch, site, 64, 0.5) for site in range(3)]) for batch in keys]) * 2.0 - 1
    for dim in range(signs.ndim):
        for distance in (1, 2):
            size = signs.shape[dim] - distance
            product = signs.narrow(dim, 0, size) * signs.narrow(dim, distance, size)
            assert abs(product.sum()) / math.sqrt(product.numel()) < 4.5, (dim, distance)
            for other in range(dim):  # a sum of marginal hashes would pass the first test and fail this one
                size = product.shape[other] - 1
                corners = product.narrow(other, 0, size) * product.narrow(other, 1, size)
                assert abs(corners.sum()) / math.sqrt(corners.numel()) < 4.5, (dim, other, distance)


def test_dropout_masks_differ_for_every_key_and_token() -> None:
    tokens = torch.cat([kept(replace(GRID, key=key), 0, 64, 0.5).flatten(0, 1) for key in (7, 8)])
    assert len(tokens.unique(dim=0)) == len(tokens)


def test_a_part_of_a_batch_drops_what_the_whole_drops() -> None:
    model = ready(DROPPED)
    rows, columns = torch.tensor([2, 0]), torch.tensor([6, 1, 3])
    part = PACKED.take_rows(rows).take_columns(columns)
    assert torch.equal(kept(part, 3, 16, 0.5), kept(PACKED, 3, 16, 0.5)[rows][:, columns])
    torch.testing.assert_close(model(PACKED.take_rows(rows)), model(PACKED)[rows], rtol=0, atol=1e-13)


def test_dropout_is_in_the_stream_at_each_place_once() -> None:
    model = ready(DROPPED)
    places = [module for module in model.modules() if isinstance(module, Dropout)]
    assert sorted(place.site for place in places) == list(range(1 + 2 * DROPPED.layers))
    whole = model(PACKED)
    for place in places:
        place.rate = 0.0
        assert not torch.allclose(model(PACKED), whole), place.site
        place.rate = DROPPED.dropout


def test_dropout_scales_what_it_keeps_and_rests_in_eval_mode() -> None:
    layer, x = ready(DROPPED).blocks["1"].dropout1, torch.ones(3, 7, 16, dtype=torch.bfloat16)
    assert layer(x, PACKED).unique().tolist() == [0, 2]
    assert layer(x, PACKED).dtype == x.dtype
    assert torch.equal(ready(DROPPED).eval()(PACKED), ready(RICH)(PACKED))
    assert not torch.allclose(ready(DROPPED)(PACKED), ready(RICH)(PACKED))


def test_recomputed_activations_see_the_same_dropout() -> None:
    model, again = ready(DROPPED), ready(DROPPED)
    for block in again.blocks.values():
        forward = block.forward
        block.forward = lambda x, batch, forward=forward: checkpoint(
            forward, x, batch, use_reentrant=False, preserve_rng_state=False
        )
    torch.testing.assert_close(gradients(again, PACKED), gradients(model, PACKED), rtol=0, atol=0)


# Loss


def test_the_loss_is_a_sum_over_valid_targets() -> None:
    logits = ready(SMALL)(PADDED)
    each = [-logits[at].log_softmax(-1)[PADDED.targets[at]] for at in map(tuple, (PADDED.targets >= 0).nonzero())]
    assert len(each) == PADDED.valid
    torch.testing.assert_close(loss_sum(logits, PADDED.targets), torch.stack(each).sum())
    assert loss_sum(logits.bfloat16(), PADDED.targets).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_no_valid_target_gives_zero_loss_and_zero_gradients(dtype: torch.dtype) -> None:
    hidden = replace(PACKED, targets=torch.full_like(PACKED.targets, IGNORED))
    model = ready(DROPPED, dtype)
    assert loss_sum(model(hidden), hidden.targets).item() == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients(model, hidden).values())


# Construction


def test_the_model_is_built_without_memory_and_without_buffers() -> None:
    for name, own in {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.float32}.items():
        model = build(RICH, name)
        assert {p.dtype for p in model.parameters()} == {own}
        assert {p.device.type for p in model.parameters()} == {"meta"}
        assert model.dtype == getattr(torch, name)
        assert not list(model.buffers())


def test_names_are_those_that_strategies_use() -> None:
    names = dict(build(RICH, "float32").named_parameters())
    linears = ["attention.q", "attention.k", "attention.v", "attention.o", "mlp.up", "mlp.down"]
    norms = ["norm1", "norm2", "attention.q_norm", "attention.k_norm"]
    modules = ["norm", *(f"blocks.{layer}.{name}" for layer in range(2) for name in linears + norms)]
    expected = {f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")}
    assert set(names) == expected | {"embed.weight", "head.weight"}


def test_the_model_knows_nothing_of_parallelism() -> None:
    sources = Path(str(sandbox.model.__file__)).parent.glob("*.py")
    assert not [path.name for path in sources if "torch.distributed" in path.read_text()]


def first_value(name: str, config: Model, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return initial(name, build(config, "float32").get_parameter(name).shape, config, seed, dtype)


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    names = list(dict(build(RICH, "float32").named_parameters()))
    forward = {name: first_value(name, RICH, 1) for name in names}
    backward = {name: first_value(name, RICH, 1) for name in reversed(names)}
    torch.manual_seed(0)
    assert all(torch.equal(forward[name], backward[name]) for name in names)
    assert not torch.equal(first_value(names[0], RICH, 1), first_value(names[0], RICH, 2))
    flat = [forward[name].flatten()[:4] for name in names if forward[name].ndim == 2]
    assert all(not torch.allclose(a / a[0], b / b[0]) for a, b in pairwise(flat)), "no two alike"


def test_initial_values_are_the_same_on_every_machine() -> None:
    drawn = first_value("blocks.0.attention.q.bias", RICH, 0, torch.float64)[:3]
    torch.testing.assert_close(
        drawn,
        torch.tensor([0.5094399418507012, -0.09080558972412583, 0.02715873031712392], dtype=torch.float64),
        rtol=0,
        atol=1e-15,
    )


def test_initial_values_in_float32_are_those_in_float64_rounded() -> None:
    exact = first_value("embed.weight", RICH, 0, torch.float64)
    assert torch.equal(first_value("embed.weight", RICH, 0), exact.float())
    assert not torch.equal(exact, exact.float().double())


def test_standard_values_are_those_of_gpt2() -> None:
    config = Model(layers=8, width=128, bias=True, norm="layer")
    assert first_value("embed.weight", config, 0).std().item() == pytest.approx(0.02, rel=0.05)
    for name in ("attention.o", "mlp.down"):
        assert first_value(f"blocks.7.{name}.weight", config, 0).std().item() == pytest.approx(0.005, rel=0.05)
        assert not first_value(f"blocks.7.{name}.bias", config, 0).any()
    assert first_value("blocks.0.attention.q.weight", config, 0).std().item() == pytest.approx(0.02, rel=0.05)
    assert first_value("norm.weight", config, 0).eq(1).all()
    assert not first_value("norm.bias", config, 0).any()


def test_rough_values_hide_nothing_and_keep_signals_of_order_one() -> None:
    config = Model(layers=4, width=64, heads=4, bias=True, norm="layer", mlp="gelu", qk_norm=True, init="rough")
    for name in dict(build(config, "float32").named_parameters()):
        value = first_value(name, config, 0)
        if value.ndim == 1:
            typical = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            assert (value - typical).abs().mean() > 0.1, name
    assert 0.3 < ready(config)(PACKED).std() < 3

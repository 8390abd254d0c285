"""RandomUnstructured against what torch documents for its own class, which serves as the oracle where it works."""

import copy
import io
import itertools
import pickle
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn.utils import prune

from torch_dual_ticket import RandomUnstructured, random_unstructured


@pytest.fixture(params=["torch", "ours"])
def method(request):
    """Each behavior that both share is checked on both."""
    return {"torch": prune.RandomUnstructured, "ours": RandomUnstructured}[request.param]


def snapshot(module):
    """Everything that pruning may touch on a module, in its order, by identity."""
    stores = (module._parameters, module._buffers, module._forward_pre_hooks)
    containers = [h for h in module._forward_pre_hooks.values() if isinstance(h, prune.PruningContainer)]
    return (
        [[(key, id(value)) for key, value in store.items()] for store in stores],
        [(key, id(value)) for key, value in vars(module).items()],
        [tuple(container) for container in containers],
    )


# ---------------------------------------------------------------------- the layout on the module


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_layout_is_torchs(method, name):
    module = nn.Conv2d(3, 4, 2)
    parameter = getattr(module, name)
    order = [n for n, _ in module.named_parameters() if n != name] + [f"{name}_orig"]

    hook = method.apply(module, name, 3)

    assert type(hook) is method
    assert list(module._forward_pre_hooks.values()) == [hook]
    assert [n for n, _ in module.named_parameters()] == order
    assert module._parameters[f"{name}_orig"] is parameter  # so that an optimizer made before goes on working
    mask = module.get_buffer(f"{name}_mask")
    assert mask.shape == parameter.shape
    assert mask.dtype == parameter.dtype
    assert not mask.requires_grad
    assert int((mask == 0).sum()) == 3
    assert set(mask.unique().tolist()) == {0, 1}
    assert torch.equal(getattr(module, name), parameter * mask)
    assert prune.is_pruned(module)


def test_function_returns_the_module_itself():
    module = nn.Linear(3, 4)
    assert random_unstructured(module, "weight", 0.5) is module
    assert isinstance(next(iter(module._forward_pre_hooks.values())), RandomUnstructured)


def test_is_an_unstructured_method_of_torch():
    assert issubclass(RandomUnstructured, prune.BasePruningMethod)
    assert RandomUnstructured.PRUNING_TYPE == "unstructured"


def test_forward_and_backward_see_the_masked_weight(method):
    module, x = nn.Linear(3, 4), torch.randn(2, 3)
    method.apply(module, "weight", 5)
    with torch.no_grad():
        module.weight_orig.add_(1)  # an update: the product is made anew before the forward
    out = module(x)
    torch.testing.assert_close(out, x @ (module.weight_orig * module.weight_mask).T + module.bias)
    out.sum().backward()
    assert torch.equal(module.weight_orig.grad == 0, module.weight_mask == 0)


def test_remove_leaves_the_pruned_parameter(method):
    module, x = nn.Linear(3, 4), torch.randn(2, 3)
    parameter = module.weight
    method.apply(module, "weight", 0.5)
    before = module(x)

    prune.remove(module, "weight")

    assert module.weight is parameter
    assert int((parameter == 0).sum()) == 6
    assert torch.equal(module(x), before)
    assert sorted(module.state_dict()) == ["bias", "weight"]
    assert not prune.is_pruned(module)
    with pytest.raises(ValueError, match="has to be pruned"):
        prune.remove(module, "weight")


def test_an_optimizer_made_before_trains_the_kept_weights_alone(method):
    module = nn.Linear(5, 4)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    method.apply(module, "weight", 0.5)
    start = module.weight_orig.detach().clone()
    module(torch.ones(1, 5)).sum().backward()
    optimizer.step()
    assert torch.equal(module.weight_orig != start, module.weight_mask == 1)


def test_recurrent_weights(method):
    rnn = nn.LSTM(input_size=8, hidden_size=4)
    method.apply(rnn, "weight_ih_l0", 0.5)
    assert int((rnn.weight_ih_l0 == 0).sum()) == 64
    out, _ = rnn(torch.randn(1, 2, 8))
    assert out.shape == (1, 2, 4)


# ---------------------------------------------------------------------- how much

AMOUNTS = [0, 1, 7, 12, np.int64(5), 0.0, 0.3, 0.5, 1.0, 0.125, 0.375, np.float32(0.3), Fraction(1, 3)]


@pytest.mark.parametrize("amount", AMOUNTS, ids=repr)
def test_count_is_torchs(amount):
    t = torch.randn(3, 4)
    expected = prune.RandomUnstructured(amount).compute_mask(t, torch.ones(3, 4))
    mask = RandomUnstructured(amount).compute_mask(t, torch.ones(3, 4))
    assert int((mask == 0).sum()) == int((expected == 0).sum())


@pytest.mark.parametrize("amount", [-1, -0.1, 1.1, 20.0, "a string", None, [0.5], 0.5j, float("inf")], ids=repr)
def test_impossible_amounts_raise_as_in_torch(amount):
    with pytest.raises((TypeError, ValueError)) as expected:
        prune.RandomUnstructured(amount)
    with pytest.raises(expected.type) as raised:
        RandomUnstructured(amount)
    assert type(raised.value) is expected.type
    assert repr(amount).strip("'") in str(raised.value)


def test_nan_is_not_an_amount():
    with pytest.raises(ValueError, match=r"amount=nan should either be a float in the range \[0, 1\]"):
        RandomUnstructured(float("nan"))


def test_bool_is_not_an_amount(method):
    """torch accepts it at first and raises the same type when the mask is drawn."""
    with pytest.raises(TypeError):
        method(True).compute_mask(torch.ones(4), torch.ones(4))


@pytest.mark.parametrize("seed", [True, 0.5, "0", torch.tensor(1)], ids=repr)
def test_seed_must_be_an_int(seed):
    with pytest.raises(TypeError, match=r"seed=.* should be an int, or None"):
        RandomUnstructured(0.5, seed=seed)


def test_any_int_is_a_seed():
    masks = [RandomUnstructured(0.5, seed).compute_mask(torch.ones(64), torch.ones(64)) for seed in (-1, 0, 2**63, 10)]
    assert all(int(mask.sum()) == 32 for mask in masks)
    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks)
    again = RandomUnstructured(0.5, np.int32(10)).compute_mask(torch.ones(64), torch.ones(64))
    assert torch.equal(again, masks[-1])


@pytest.mark.parametrize("size", [(), (0,), (0, 3), (1,)], ids=str)
def test_smallest_tensors(method, size):
    mask = method(0.5).compute_mask(torch.ones(size), torch.ones(size))
    assert torch.equal(mask, torch.ones(size))  # round(0.5) is 0
    mask = method(1.0).compute_mask(torch.ones(size), torch.ones(size))
    assert torch.equal(mask, torch.zeros(size))


# ---------------------------------------------------------------------- earlier masks


def test_called_twice_prunes_what_was_left(method):
    module = nn.Linear(8, 8)
    method.apply(module, "weight", 0.5)
    first = module.weight_mask.clone()
    hook = method.apply(module, "weight", 0.5)
    assert type(hook) is prune.PruningContainer
    assert [type(h) for h in hook] == [method, method]
    assert len(module._forward_pre_hooks) == 1
    assert int((module.weight_mask == 0).sum()) == 48
    assert bool((module.weight_mask <= first).all())
    assert method.apply(module, "weight", 16) is hook  # a third goes into the same container
    assert int(module.weight_mask.sum()) == 0


# Each takes a layer with a 4 × 6 weight.
STOCK = {
    "identity": lambda m: prune.identity(m, "weight"),
    "random_unstructured": lambda m: prune.random_unstructured(m, "weight", 6),
    "l1_unstructured": lambda m: prune.l1_unstructured(m, "weight", 6),
    "random_structured": lambda m: prune.random_structured(m, "weight", 1, dim=0),
    "ln_structured": lambda m: prune.ln_structured(m, "weight", 1, n=2, dim=1),
    "custom_from_mask": lambda m: prune.custom_from_mask(m, "weight", torch.arange(24).view(4, 6) % 4 != 0),
}


@pytest.mark.parametrize("stock", STOCK)
def test_on_top_of_a_stock_method(stock, method):
    module = nn.Linear(6, 4)
    STOCK[stock](module)
    before = module.weight_mask.clone()
    left = int(before.sum())
    method.apply(module, "weight", 0.5)
    assert int(module.weight_mask.sum()) == left - round(0.5 * left)
    assert bool((module.weight_mask <= before).all())
    kept = module.weight_mask.bool()
    module(torch.ones(1, 6)).sum().backward()
    prune.remove(module, "weight")
    assert torch.equal(module.weight != 0, kept)


@pytest.mark.parametrize("stock", STOCK)
def test_under_a_stock_method(stock, method):
    module = nn.Linear(6, 4)
    method.apply(module, "weight", 6)
    before = module.weight_mask.clone()
    STOCK[stock](module)
    assert type(next(iter(module._forward_pre_hooks.values()))) is prune.PruningContainer
    assert bool((module.weight_mask <= before).all())
    if stock.endswith("_unstructured"):
        assert int(module.weight_mask.sum()) == 12
    assert torch.equal(module.weight, module.weight_orig * module.weight_mask)


def test_in_a_container_made_manually(method):
    container = prune.PruningContainer()
    container._tensor_name = "weight"
    for amount in (4, 0.5):
        part = method(amount)
        part._tensor_name = "weight"
        container.add_pruning_method(part)
    default = torch.ones(4, 4)
    default[0] = 0
    mask = container.compute_mask(torch.randn(4, 4), default)
    assert int(mask.sum()) == 6
    assert bool((mask <= default).all())


def test_compute_mask_draws_from_all_entries_as_torch_does(method):
    """Only a container sets the masked entries aside; a direct call draws from them too, and keeps them masked."""
    default = torch.ones(1000)
    default[:500] = 0
    mask = method(500).compute_mask(torch.ones(1000), default)
    assert bool((mask[:500] == 0).all())
    assert 150 < int(mask[500:].sum()) < 350  # 250 expected, 11 the standard deviation


def test_compute_mask_leaves_the_default_mask_alone(method):
    default = torch.ones(4, 4)
    for amount in (0, 8):
        mask = method(amount).compute_mask(torch.ones(4, 4), default)
        assert mask is not default
        assert torch.equal(default, torch.ones(4, 4))
        mask.zero_()
    assert torch.equal(default, torch.ones(4, 4))


def test_prune_of_a_tensor(method):
    t = torch.arange(1.0, 17.0).view(4, 4)
    pruned = method(4).prune(t)
    assert int((pruned == 0).sum()) == 4
    assert bool(((pruned == 0) | (pruned == t)).all())
    default = torch.ones(4, 4)
    default[:2] = 0
    assert bool((method(0.5).prune(t, default_mask=default)[:2] == 0).all())
    with pytest.raises(AssertionError, match="same shape"):
        method(4).prune(t, importance_scores=torch.ones(3))


def test_global_unstructured(method):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 5))
    targets = [(model[0], "weight"), (model[2], "weight"), (model[2], "bias")]
    total = 2 * 4 * 9 + 16 * 5 + 5
    prune.global_unstructured(targets, pruning_method=method, amount=0.5)
    kept = sum(int(getattr(module, f"{name}_mask").sum()) for module, name in targets)
    assert kept == total - round(0.5 * total)
    prune.global_unstructured(targets, pruning_method=method, amount=20)  # of those still unpruned
    assert sum(int(getattr(module, f"{name}_mask").sum()) for module, name in targets) == kept - 20
    model(torch.randn(2, 2, 4, 4)).sum().backward()
    for module, name in targets:
        prune.remove(module, name)
    assert sum(int((getattr(module, name) == 0).sum()) for module, name in targets) == total - kept + 20


def test_global_unstructured_with_a_seed():
    def masks(seed):
        model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4, dtype=torch.float32))
        targets = [(layer, "weight") for layer in model]
        prune.global_unstructured(targets, pruning_method=RandomUnstructured, amount=0.8, seed=seed)
        return torch.cat([layer.weight_mask.flatten() for layer in model])

    assert torch.equal(masks(3), masks(3))
    assert not torch.equal(masks(3), masks(4))


# ---------------------------------------------------------------------- where the entries come from


def test_reproducible_by_manual_seed(method):
    def draw():
        torch.manual_seed(5)
        return [method(0.5).compute_mask(torch.ones(64), torch.ones(64)) for _ in range(2)]

    first, second = draw()
    assert not torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(draw(), (first, second), strict=True))


def test_one_instance_without_a_seed_draws_anew_each_time(method):
    m = method(0.5)
    assert not torch.equal(
        m.compute_mask(torch.ones(64), torch.ones(64)), m.compute_mask(torch.ones(64), torch.ones(64))
    )


@pytest.mark.parametrize(("amount", "seed"), [(0.5, 3), (0, None), (0.0, None)])
def test_global_generator_is_untouched_where_it_is_not_needed(amount, seed):
    module = nn.Linear(4, 4)
    before = torch.get_rng_state()
    random_unstructured(module, "weight", amount, seed)
    assert torch.equal(torch.get_rng_state(), before)


def test_seed_alone_decides():
    """Not the device, the dtype, the memory format or the values; and not whether there is a container."""
    expected = random_unstructured(nn.Conv2d(4, 6, 3), "weight", 0.7, seed=11).weight_mask
    variants = {
        "double": nn.Conv2d(4, 6, 3, dtype=torch.float64),
        "bfloat16": nn.Conv2d(4, 6, 3, dtype=torch.bfloat16),
        "complex": nn.Conv2d(4, 6, 3, dtype=torch.complex64),
        "channels_last": nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last),
        "container": prune.identity(nn.Conv2d(4, 6, 3), "weight"),
    }
    for label, module in variants.items():
        random_unstructured(module, "weight", 0.7, seed=11)
        assert torch.equal(module.weight_mask.real.float(), expected), label
    assert not torch.equal(random_unstructured(nn.Conv2d(4, 6, 3), "weight", 0.7, seed=12).weight_mask, expected)


def test_mask_of_a_seed_is_stable_across_releases():
    mask = RandomUnstructured(8, seed=0).compute_mask(torch.ones(16), torch.ones(16))
    assert mask.int().tolist() == [1, 1, 0, 1, 0, 1, 0, 1, 0, 0, 0, 1, 0, 1, 1, 0]


def test_masks_of_one_seed_are_nested():
    ones = torch.ones(7, 9)
    masks = [RandomUnstructured(amount, seed=4).compute_mask(ones, ones) for amount in range(64)]
    assert all(bool((more <= less).all()) for less, more in itertools.pairwise(masks))


def test_stacking_one_seed_twice_draws_independently():
    """The second draw is among fewer entries, so it is another permutation."""
    half = torch.ones(4096)
    first = RandomUnstructured(0.5, seed=1).compute_mask(half, half).bool()
    module = nn.Linear(64, 128)
    random_unstructured(module, "weight", 0.5, seed=1)
    left = module.weight_mask.flatten().bool()
    random_unstructured(module, "weight", 0.5, seed=1)
    second = module.weight_mask.flatten().bool()[left]
    assert torch.equal(second, first)  # the seed still decides
    runs = (second[1:] == second[:-1]).float().mean()
    assert 0.45 < float(runs) < 0.55


# ---------------------------------------------------------------------- where the stock method raises


def test_channels_last_stays_channels_last():
    module = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    random_unstructured(module, "weight", 0.5, seed=0)
    for tensor in (module.weight_mask, module.weight, module.weight_orig):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    random_unstructured(module, "weight", 0.5, seed=0)
    prune.l1_unstructured(module, "weight", 4)
    assert int(module.weight_mask.sum()) == 50
    module(torch.randn(1, 4, 5, 5).to(memory_format=torch.channels_last)).sum().backward()
    prune.remove(module, "weight")
    assert int((module.weight == 0).sum()) == 216 - 50


def test_complex():
    module = nn.Linear(4, 6, dtype=torch.complex64)
    random_unstructured(module, "weight", 0.5, seed=0)
    assert module.weight_mask.dtype == torch.complex64
    assert int((module.weight == 0).sum()) == 12
    random_unstructured(module, "weight", 0.5, seed=0)
    module(torch.randn(2, 4, dtype=torch.complex64)).abs().sum().backward()
    prune.global_unstructured([(module, "weight")], pruning_method=RandomUnstructured, amount=3)
    prune.remove(module, "weight")
    assert int((module.weight == 0).sum()) == 21


def test_transposed_tensor():
    t = torch.arange(1.0, 13.0).view(3, 4).T
    assert int((RandomUnstructured(5).prune(t) == 0).sum()) == 5


def test_meta_device(method):
    module = nn.Linear(100, 100, device="meta")
    method.apply(module, "weight", 0.5)
    assert module.weight_mask.is_meta
    assert module.weight_mask.shape == (100, 100)


# ---------------------------------------------------------------------- errors leave the module as it was


@pytest.mark.parametrize("earlier", [0, 1, 2])
@pytest.mark.parametrize(
    ("name", "amount", "seed", "error"),
    [
        ("weight", 13, None, ValueError),
        ("weight", 1.5, None, ValueError),
        ("weight", "half", None, TypeError),
        ("weight", 0.5, 0.5, TypeError),
        ("nothing", 0.5, None, AttributeError),
        ("other", 0.5, None, TypeError),  # None, as the bias of a layer without one
    ],
    ids=repr,
)
def test_failed_call_changes_nothing(earlier, name, amount, seed, error):
    module = nn.Linear(3, 4)
    module.register_parameter("other", None)
    for _ in range(earlier):
        prune.identity(module, "weight")
    before = snapshot(module)
    with pytest.raises(error):
        random_unstructured(module, name, amount, seed)
    assert snapshot(module) == before
    module(torch.ones(1, 3))
    random_unstructured(module, "weight", 5)
    assert int((module.weight == 0).sum()) == 5


def test_too_large_amount_says_what_is_left():
    module = random_unstructured(nn.Linear(3, 4), "weight", 5)
    with pytest.raises(ValueError, match=r"amount=8 .* left to prune, which is 7"):
        random_unstructured(module, "weight", 8)


def test_uninitialized_lazy_module_is_refused_unchanged():
    module = nn.LazyLinear(4)
    before = snapshot(module)
    with pytest.raises(ValueError, match="uninitialized"):
        random_unstructured(module, "weight", 0.5)
    assert snapshot(module) == before
    module(torch.ones(1, 3))
    random_unstructured(module, "weight", 0.5)
    assert int((module.weight == 0).sum()) == 6


def test_scores_of_another_shape_are_refused_unchanged(method):
    """The base class's apply can be called with scores; a random mask has no use for them, but its check stays."""
    module = nn.Linear(3, 4)
    with pytest.raises(TypeError, match="importance_scores"):
        method.apply(module, "weight", 0.5, importance_scores=torch.ones(2))
    assert list(dict(module.named_parameters())) == ["weight", "bias"]


# ---------------------------------------------------------------------- copies and files


def test_pickle(method):
    model = nn.Sequential(nn.Linear(5, 4), nn.Conv2d(2, 2, 3))
    for layer in model:
        method.apply(layer, "weight", 0.5)
        method.apply(layer, "weight", 0.5)
    twin = pickle.loads(pickle.dumps(model))
    for layer, other in zip(model, twin, strict=True):
        assert torch.equal(layer.weight, other.weight)
        assert torch.equal(layer.weight_mask, other.weight_mask)
        assert [type(h) for h in next(iter(other._forward_pre_hooks.values()))] == [method, method]


def test_torch_save_of_the_module_and_of_its_state(method):
    module = nn.Linear(5, 4)
    method.apply(module, "weight", 0.5)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    whole = torch.load(buffer, weights_only=False)
    assert torch.equal(whole.weight, module.weight)

    fresh = nn.Linear(5, 4)
    method.apply(fresh, "weight", 0.1)
    fresh.load_state_dict(module.state_dict())
    x = torch.randn(2, 5)
    assert torch.equal(fresh(x), module(x))


def test_deepcopy_after_a_forward_without_gradients(method):
    """The stock layout holds the product of the last forward; it copies when that is not a part of a graph."""
    module = nn.Linear(5, 4)
    method.apply(module, "weight", 0.5)
    with torch.no_grad():
        module(torch.ones(1, 5))
    twin = copy.deepcopy(module)
    assert torch.equal(twin.weight, module.weight)
    assert prune.is_pruned(twin)


# ---------------------------------------------------------------------- properties

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128]
SHAPES = st.lists(st.integers(1, 6), min_size=0, max_size=5).map(tuple)


@st.composite
def cases(draw):
    """A tensor, an earlier mask for it, an amount that fits what is left, and a seed."""
    shape = draw(SHAPES)
    t = torch.zeros(shape, dtype=draw(st.sampled_from(DTYPES)))
    if t.dim() == 4 and draw(st.booleans()):
        t = t.to(memory_format=torch.channels_last)
    flat = draw(st.lists(st.booleans(), min_size=t.numel(), max_size=t.numel()))
    earlier = torch.tensor(flat, dtype=torch.bool).view(shape)
    left = int(earlier.sum())
    amount = draw(st.one_of(st.integers(0, left), st.floats(0, 1)))
    return t, earlier, amount, draw(st.one_of(st.none(), st.integers(0, 2**64)))


@settings(deadline=None)
@given(cases())
def test_count_nesting_and_layout_for_any_tensor(case):
    t, earlier, amount, seed = case
    module = nn.Module()
    module.register_parameter("w", nn.Parameter(t))
    prune.custom_from_mask(module, "w", earlier)
    default = module.w_mask.clone()
    left = int(earlier.sum())

    random_unstructured(module, "w", amount, seed)

    mask = module.w_mask
    assert mask.shape == t.shape
    assert mask.dtype == default.dtype
    assert bool((mask == 1).logical_or(mask == 0).all())
    assert not bool(((mask == 1) & ~earlier).any())
    assert int((mask == 1).sum()) == left - (amount if isinstance(amount, int) else round(amount * left))

    oracle = nn.Module()
    oracle.register_parameter("w", nn.Parameter(torch.zeros(t.shape)))
    prune.custom_from_mask(oracle, "w", earlier)
    prune.random_unstructured(oracle, "w", amount)
    assert int((oracle.w_mask == 1).sum()) == int((mask == 1).sum())

    prune.remove(module, "w")
    assert module.w.shape == t.shape
    assert module.w.dtype == t.dtype


@settings(deadline=None)
@given(cases(), st.floats(0, 1))
def test_direct_masks_keep_dtype_and_format(case, amount):
    t, _, _, seed = case
    default = torch.ones_like(t)
    mask = RandomUnstructured(amount, seed).compute_mask(t, default)
    assert mask.dtype == t.dtype
    assert mask.stride() == default.stride()
    assert int((mask == 0).sum()) == round(amount * t.numel())


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.integers(1, 300))
def test_every_entry_has_the_same_chance(first_seed, n):
    """Mean over seeds of each position of a mask with half its entries pruned: binomial, 6 standard deviations."""
    draws, ones = 200, torch.ones(n)
    pruned = round(0.5 * n)
    total = sum(RandomUnstructured(pruned, first_seed + i).compute_mask(ones, ones) for i in range(draws))
    p = 1 - pruned / n
    assert bool(((total - draws * p).abs() <= 6 * (draws * p * (1 - p)) ** 0.5 + 1e-3).all())


def test_in_the_place_of_the_class_of_torch(monkeypatch):
    monkeypatch.setattr(prune, "RandomUnstructured", RandomUnstructured)
    for function in (random_unstructured, prune.random_unstructured):
        assert int((function(nn.Linear(4, 4), "weight", amount=0.5).weight == 0).sum()) == 8

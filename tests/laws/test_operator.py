import math

import diffrax as dfx
import equinox as eqx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import jaxtyping
import lineax as lx
import numpy as np
import pytest
from hypothesis import given

import gddim_eqx as gd
from gddim_eqx import BlockLinearOperator
from gddim_eqx._linear import matmul


DATA = (2, 3, 2)
SPECTRA = [(), (2, 3, 1)]
EXACT = 1e-12 if jnp.result_type(float) == np.float64 else 1e-5

every_n = pytest.mark.parametrize("n", [1, 2, 3])
every_spectrum = pytest.mark.parametrize("spectrum", SPECTRA, ids=str)


def random_operator(n, spectrum=(), seed=0, kind="general", dtype=float):
    """An operator with random blocks, well conditioned and with a truthful tag."""
    rng = np.random.default_rng(seed)
    blocks = rng.normal(size=(*spectrum, n, n)) + 3 * n**0.5 * np.eye(n)
    tags = frozenset()
    if kind == "definite":
        blocks = blocks @ np.swapaxes(blocks, -1, -2) / n
        tags = lx.positive_semidefinite_tag
    elif kind == "symmetric":
        blocks = blocks + np.swapaxes(blocks, -1, -2) - 7
        tags = lx.symmetric_tag
    elif kind == "lower":
        blocks, tags = np.tril(blocks), lx.lower_triangular_tag
    elif kind == "upper":
        blocks, tags = np.triu(blocks), lx.upper_triangular_tag
    elif kind == "diagonal":
        blocks, tags = blocks * np.eye(n), lx.diagonal_tag
    blocks = np.moveaxis(blocks, (-2, -1), (0, 1))
    return BlockLinearOperator(jnp.asarray(blocks, dtype), DATA, tags)


def random_state(n, batch=(), seed=1, dtype=float):
    rng = np.random.default_rng(seed)
    leaves = [jnp.asarray(rng.normal(size=(*batch, *DATA)), dtype) for _ in range(n)]
    return {1: lambda x: x, 2: gd.Phase}.get(n, lambda *x: x)(*leaves)


def flat(state, batch=()):
    """A state as rows of NumPy vectors, in the order of `as_matrix`."""
    leaves = [np.asarray(x).reshape(*batch, -1) for x in jtu.tree_leaves(state)]
    return np.concatenate(leaves, -1)


_as_matrix = jax.jit(lambda operator: operator.as_matrix())


def matrix(operator):
    # Without the tags, which are static and would be compiled for.
    return np.asarray(_as_matrix(BlockLinearOperator(operator.blocks, operator.shape)))


def assert_close(actual, expected, tolerance=EXACT):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * max(np.abs(expected).max(), 1)


@every_n
@every_spectrum
def test_matrix_is_the_block_at_every_coordinate(n, spectrum):
    operator = random_operator(n, spectrum)
    blocks = np.asarray(operator.blocks).reshape(n, n, *(spectrum or (1, 1, 1)))
    blocks = np.broadcast_to(blocks, (n, n, *DATA)).reshape(n, n, -1)
    dense = matrix(operator).reshape(n, blocks.shape[-1], n, blocks.shape[-1])
    for i in range(n):
        for j in range(n):
            assert (dense[i, :, j] == np.diag(blocks[i, j])).all()
    assert operator.in_structure() == operator.out_structure()
    assert operator.in_size() == n * math.prod(DATA)


def test_a_single_number_can_be_the_data():
    operator = BlockLinearOperator(jnp.array([[1.0, 2.0], [3.0, 4.0]]), ())
    assert_close(matrix(operator), [[1, 2], [3, 4]])
    assert_close(flat(operator.mv(gd.Phase(jnp.array(5.0), jnp.array(6.0)))), [17, 39])


@every_n
@every_spectrum
def test_mv_is_the_matrix_product_on_any_batch(n, spectrum):
    operator = random_operator(n, spectrum)
    for batch in [(), (4,), (2, 3)]:
        state = random_state(n, batch)
        out = operator.mv(state)
        assert jtu.tree_structure(out) == jtu.tree_structure(state)
        assert_close(flat(out, batch), flat(state, batch) @ matrix(operator).T)


@every_n
def test_mv_of_an_empty_batch_is_empty(n):
    out = random_operator(n, (2, 3, 1)).mv(random_state(n, (0,)))
    assert [x.shape for x in jtu.tree_leaves(out)] == [(0, *DATA)] * n


@pytest.mark.parametrize("spectrum", [(1, 1, 1), (2, 1, 2), DATA], ids=str)
def test_spectrum_may_broadcast_along_any_axis(spectrum):
    operator, state = random_operator(2, spectrum), random_state(2, (4,))
    assert_close(flat(operator.mv(state), (4,)), flat(state, (4,)) @ matrix(operator).T)


@every_n
@every_spectrum
def test_mv_is_the_same_under_vmap(n, spectrum):
    operator, state = random_operator(n, spectrum), random_state(n, (4,))
    assert_close(flat(jax.vmap(operator.mv)(state)), flat(operator.mv(state)))


@every_n
def test_operators_can_be_batched_by_vmap(n):
    times = jnp.array([0.5, 2.0])
    operator, state = random_operator(n, DATA), random_state(n, (2,))
    many = eqx.filter_vmap(lambda t: operator * t)(times)
    out = eqx.filter_vmap(lambda op, x: op.mv(x))(many, state)
    expected = np.asarray(times)[:, None] * (flat(state, (2,)) @ matrix(operator).T)
    assert_close(flat(out, (2,)), expected)


@every_n
def test_gradient_flows_through_blocks_and_state(n):
    operator, state = random_operator(n, (2, 3, 1)), random_state(n)
    fn = lambda op, x: sum(y.sum() for y in jtu.tree_leaves(op.mv(x)))
    to_blocks = eqx.filter_grad(lambda op: fn(op, state))(operator).blocks
    sums = np.stack([np.asarray(x).sum(-1, keepdims=True) for x in jtu.tree_leaves(state)])
    assert_close(to_blocks, np.broadcast_to(sums[None], to_blocks.shape))
    to_state = jax.grad(lambda x: fn(operator, x))(state)
    assert_close(flat(to_state), matrix(operator).sum(0))


KINDS = ["general", "definite", "symmetric", "lower", "upper", "diagonal"]
ACTIONS = ["add", "subtract", "compose", "scale", "divide", "negate", "transpose", "invert"]
kinds, actions = st.sampled_from(KINDS), st.sampled_from(ACTIONS)


def apply_action(action, operator, dense, other):
    """The same action on an operator and on the matrix that it stands for."""
    if action == "add":
        return operator + other, dense + matrix(other)
    if action == "subtract":
        return operator - other, dense - matrix(other)
    if action == "compose":
        return operator @ other, dense @ matrix(other)
    if action == "scale":
        return 2.5 * operator * jnp.asarray(-1.5), -3.75 * dense
    if action == "divide":
        return operator / 4, dense / 4
    if action == "negate":
        return -operator, -dense
    if action == "transpose":
        return operator.T, dense.T
    return operator.inverse(), np.linalg.inv(dense)


def claims_that_fail(operator):
    """What `lineax` is told about an operator and is not true of its matrix."""
    m = matrix(operator)
    slack = 100 * EXACT * np.abs(m).max()
    zero = lambda x: np.abs(x).max() <= slack
    symmetric = zero(m - m.T)
    facts = {
        "is_symmetric": symmetric,
        "is_diagonal": zero(m - np.diag(np.diag(m))),
        "is_tridiagonal": zero(m - np.triu(np.tril(m, 1), -1)),
        "is_lower_triangular": zero(np.triu(m, 1)),
        "is_upper_triangular": zero(np.tril(m, -1)),
        "is_positive_semidefinite": symmetric and np.linalg.eigvalsh(m)[0] > -slack,
        "is_negative_semidefinite": symmetric and np.linalg.eigvalsh(m)[-1] < slack,
        "has_unit_diagonal": zero(np.diag(m) - 1),
    }
    return [name for name, fact in facts.items() if getattr(lx, name)(operator) > fact]


@given(
    n=st.integers(1, 3),
    spectra=st.tuples(*[st.sampled_from(SPECTRA)] * 2),
    which=st.tuples(kinds, kinds),
    sequence=st.lists(actions, min_size=1, max_size=4),
)
def test_expressions_equal_those_of_matrices(n, spectra, which, sequence):
    operator = random_operator(n, spectra[0], 0, which[0])
    other = random_operator(n, spectra[1], 1, which[1])
    dense = matrix(operator)
    for action in sequence:
        if action == "invert" and np.linalg.cond(dense) > 100:
            continue
        operator, dense = apply_action(action, operator, dense, other)
        assert isinstance(operator, BlockLinearOperator)
        assert_close(matrix(operator), dense, 1e4 * EXACT)


@pytest.mark.parametrize("action", ACTIONS)
def test_no_tag_lies_about_any_result(action):
    for kind in KINDS:
        for other_kind in KINDS:
            operator = random_operator(2, (2, 3, 1), 0, kind)
            other = random_operator(2, (), 1, other_kind)
            result, _ = apply_action(action, operator, matrix(operator), other)
            assert claims_that_fail(result) == [], (kind, other_kind)


@every_n
def test_tags_survive_where_the_property_does(n):
    a, b = (random_operator(n, (2, 3, 1), seed, "definite") for seed in (0, 1))
    for operator in (a, a + b, a.T, a.inverse()):
        assert lx.is_positive_semidefinite(operator) and lx.is_symmetric(operator)
    a, b = (random_operator(n, (), seed, "symmetric") for seed in (0, 1))
    for operator in (a, a + b, a - b, -a, 2 * a, a / 3, a.T, a.inverse()):
        assert lx.is_symmetric(operator)
    a, b = (random_operator(n, (), seed, "lower") for seed in (0, 1))
    for operator in (a, a + b, a - b, -a, 2 * a, a / 3, a @ b):
        assert lx.is_lower_triangular(operator)
    assert lx.is_upper_triangular(a.T)
    assert lx.is_lower_triangular((a @ a.T).cholesky())


@pytest.mark.parametrize("n", [2, 3])
def test_tags_do_not_survive_where_the_property_may_not(n):
    a, b = (random_operator(n, (), seed, "definite") for seed in (0, 1))
    for operator in (a - b, -a, -2 * a):
        assert not lx.is_positive_semidefinite(operator)
    assert not lx.is_symmetric(a @ b)
    lower = random_operator(n, (), 0, "lower")
    for operator in (lower.T, lower + a, lower @ a, lower @ lower.T):
        assert not lx.is_lower_triangular(operator)
    assert not lx.is_diagonal(a) and not lx.is_tridiagonal(a)


@every_n
@every_spectrum
def test_inverse_and_cholesky_undo_and_factor(n, spectrum):
    operator = random_operator(n, spectrum, kind="definite")
    identity = np.eye(operator.in_size())
    assert_close(matrix(operator @ operator.inverse()), identity, 100 * EXACT)
    root = operator.cholesky()
    assert_close(matrix(root @ root.T), matrix(operator), 100 * EXACT)
    assert_close(matrix(root), np.linalg.cholesky(matrix(operator)), 100 * EXACT)
    assert (np.triu(matrix(root), 1) == 0).all()


@every_n
@pytest.mark.parametrize("kind", ["general", "definite", "lower", "upper", "diagonal"])
def test_linear_solve_agrees_with_dense(n, kind):
    operator = random_operator(n, (2, 3, 1), kind=kind)
    state = random_state(n)
    value = lx.linear_solve(operator, state, lx.AutoLinearSolver(well_posed=True)).value
    assert jtu.tree_structure(value) == jtu.tree_structure(state)
    expected = np.linalg.solve(matrix(operator), flat(state))
    assert_close(flat(value), expected, 100 * EXACT)


def test_linear_solve_has_a_gradient():
    operator, state = random_operator(2), random_state(2)

    def fn(blocks):
        solution = lx.linear_solve(BlockLinearOperator(blocks, DATA), state).value
        return solution.x.sum() + 2 * solution.v.sum()

    def by_hand(blocks):
        solution = BlockLinearOperator(blocks, DATA).inverse().mv(state)
        return solution.x.sum() + 2 * solution.v.sum()

    assert_close(
        jax.grad(fn)(operator.blocks), jax.grad(by_hand)(operator.blocks), 1e3 * EXACT
    )


@every_n
@every_spectrum
def test_diagonal_and_tridiagonal_are_those_of_the_matrix(n, spectrum):
    operator = random_operator(n, spectrum)
    dense = matrix(operator)
    assert (np.asarray(lx.diagonal(operator)) == np.diag(dense)).all()
    for got, offset in zip(lx.tridiagonal(operator), (0, -1, 1)):
        assert (np.asarray(got) == np.diag(dense, offset)).all()


def test_tridiagonal_solver_accepts_one_component():
    operator, state = random_operator(1, (2, 3, 1)), random_state(1)
    value = lx.linear_solve(operator, state, lx.Tridiagonal()).value
    assert_close(value, state / operator.blocks[0, 0], 100 * EXACT)


@every_n
def test_lineax_views_keep_the_operator(n):
    operator = random_operator(n, (2, 3, 1))
    for view in (lx.linearise, lx.materialise, lx.conj):
        assert isinstance(view(operator), BlockLinearOperator)
        assert (matrix(view(operator)) == matrix(operator)).all()
    product = operator @ lx.IdentityLinearOperator(operator.in_structure())
    assert_close(product.as_matrix(), matrix(operator))


@every_n
def test_sum_with_another_kind_of_operator_is_lineax_own(n):
    operator = random_operator(n)
    identity = lx.IdentityLinearOperator(operator.in_structure())
    dense, eye = matrix(operator), np.eye(operator.in_size())
    assert_close((operator + identity).as_matrix(), dense + eye)
    assert_close((operator - identity).as_matrix(), dense - eye)


def test_control_term_takes_it_as_vector_field_of_a_brownian_motion():
    operator, state = random_operator(2, (2, 3, 1)), random_state(2)
    brownian = dfx.UnsafeBrownianPath(operator.in_structure(), jax.random.key(0))
    term = dfx.ControlTerm(lambda t, y, args: operator, brownian)
    end = dfx.diffeqsolve(
        term, dfx.Euler(), 0.0, 1.0, 0.25, state, adjoint=dfx.DirectAdjoint()
    ).ys
    times = jnp.linspace(0, 1, 5)
    steps = jax.vmap(brownian.evaluate)(times[:-1], times[1:])
    increment = flat(steps, (4,)).sum(0)
    expected = flat(state) + matrix(operator) @ increment
    assert_close(flat(end, (1,))[0], expected, 10 * EXACT)


class _Line(dfx.AbstractPath):
    direction: gd.Phase
    t0: float = 0.0
    t1: float = 1.0

    def evaluate(self, t0, t1=None, left=True):
        del left
        assert t1 is not None
        return jtu.tree_map(lambda x: (t1 - t0) * x, self.direction)


def test_control_term_takes_it_as_vector_field_of_a_smooth_control():
    operator, direction = random_operator(2, (2, 3, 1)), random_state(2)
    term = dfx.ControlTerm(lambda t, y, args: operator * t, _Line(direction))
    start = jtu.tree_map(jnp.zeros_like, direction)
    end = dfx.diffeqsolve(term, dfx.Midpoint(), 0.0, 1.0, 0.5, start).ys
    expected = 0.5 * matrix(operator) @ flat(direction)
    assert_close(flat(end, (1,))[0], expected, 10 * EXACT)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@every_n
def test_mv_in_half_precision(n, dtype):
    operator, state = random_operator(n, (2, 3, 1)), random_state(n, (4,))
    half = operator.astype(dtype).mv(jtu.tree_map(lambda x: x.astype(dtype), state))
    assert all(x.dtype == dtype for x in jtu.tree_leaves(half))
    error = flat(half, (4,)).astype(float) - flat(operator.mv(state), (4,))
    sizes = np.abs(flat(state, (4,))) @ np.abs(matrix(operator)).T
    assert (np.abs(error) <= 4 * float(jnp.finfo(dtype).eps) * sizes).all()


@pytest.mark.parametrize("scalar", [2, 2.0, np.float32(2), jnp.float32(2)], ids=repr)
def test_scalars_keep_the_dtype(scalar):
    operator = random_operator(2, dtype=jnp.float32)
    for result in (operator * scalar, scalar * operator, operator / scalar):
        assert result.blocks.dtype == jnp.float32
    assert operator.astype(jnp.float16).blocks.dtype == jnp.float16


def test_astype_keeps_tags():
    operator = random_operator(2, kind="definite").astype(jnp.float16)
    assert lx.is_positive_semidefinite(operator)


@pytest.mark.parametrize("shape", [(2, 2, 3), (2, 2, 2, 3), (2, 2, 2, 3, 3)], ids=str)
def test_spectrum_that_does_not_fit_the_data_raises(shape):
    with pytest.raises(ValueError, match=r"data's shape \(2, 3, 2\)"):
        BlockLinearOperator(jnp.ones(shape), DATA)


@pytest.mark.parametrize("shape", [(), (2,), (2, 3), (2, 1, 2, 3, 1)], ids=str)
def test_blocks_that_are_not_square_raise(shape, monkeypatch):
    # Without the run-time type checks that only this test-suite has.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="`blocks` must have shape"):
        BlockLinearOperator(jnp.ones(shape), DATA)


@pytest.mark.parametrize(
    "state",
    [
        jnp.ones(DATA),
        (jnp.ones(DATA),) * 3,
        gd.Phase(jnp.ones(DATA), jnp.ones((2, 3))),
        gd.Phase(jnp.ones((2, 3, 4)), jnp.ones((2, 3, 4))),
        gd.Phase(jnp.ones(2), jnp.ones(2)),
    ],
    ids=["one leaf", "three leaves", "one wrong", "both wrong", "too few axes"],
)
def test_mv_of_a_state_that_does_not_fit_raises(state):
    with pytest.raises(ValueError, match=r"2 component\(s\) of shape \(\*batch, 2, 3, 2"):
        random_operator(2).mv(state)


def test_operators_on_different_states_do_not_combine():
    one, other = random_operator(1), random_operator(2)
    elsewhere = BlockLinearOperator(jnp.ones((1, 1)), (3,))
    for a, b in [(one, other), (one, elsewhere)]:
        for combine in (lambda: a + b, lambda: a - b, lambda: a @ b):
            with pytest.raises(ValueError, match="same states"):
                combine()


def test_only_scalars_multiply():
    operator, array = random_operator(1), jnp.ones(3)
    for multiply in (lambda: operator * array, lambda: operator / array):
        with pytest.raises(ValueError, match="scalars"):
            multiply()


def test_only_operators_combine():
    operator, state = random_operator(1), random_state(1)
    for combine in (
        lambda: operator + 1,
        lambda: operator - state,
        lambda: operator @ state,
    ):
        with pytest.raises(ValueError, match="Can only"):
            combine()


@pytest.mark.float32
def test_products_under_many_axes():
    # XLA's CPU compiler (jax 0.10.2) made this crash as a sum over an axis.
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 20, 50, 2, 2, 4, 6, 1)).astype(np.float32)
    got = jax.jit(jax.vmap(jax.vmap(matmul)))(a, b)
    np.testing.assert_allclose(
        got, np.einsum("...ijhwc,...jkhwc->...ikhwc", a, b), rtol=1e-4, atol=1e-5
    )

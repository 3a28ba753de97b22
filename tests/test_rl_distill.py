"""The logit-level distillation loss against NumPy in float64, its gradient by differences of it."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.examples.distill import TopK, chunked_top_k, distillation_loss, lumped_kl, top_k

B, T, D, V = 2, 7, 5, 11
KEPT = (1, 4, V)


def softmax(x):
    p = np.exp(np.float64(x) - x.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def kl_by_hand(teacher_logits, student_logits, k):
    """KL of the k most probable tokens and the rest, float64 [B, T]; logits of any float type."""
    p, q = softmax(teacher_logits), softmax(student_logits)
    order = np.argsort(-p, axis=-1, kind="stable")
    p, q = (np.take_along_axis(x, order, axis=-1) for x in (p, q))
    if k < p.shape[-1]:
        p, q = (np.concatenate([x[..., :k], x[..., k:].sum(-1)[..., None]], -1) for x in (p, q))
    return (p * np.log(p / q)).sum(-1)


def draw(seed, *shape, scale=1.0):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


@functools.cache
def kl_and_gradients(k):
    """(teacher logits, student logits) -> KL [B, T], gradients of its sum with respect to both."""

    def total(teacher, student):
        kl = lumped_kl(top_k(teacher, k), student)
        return kl.sum(), kl

    return jax.jit(lambda *logits: jax.grad(total, (0, 1), has_aux=True)(*logits)[::-1])


@given(st.sampled_from(KEPT), st.integers(0, 99), st.sampled_from([0.1, 1.0, 6.0]))
def test_kl_is_that_of_the_kept_tokens_and_the_rest(k, seed, scale):
    teacher, student = draw(seed, B, T, V, scale=scale), draw(seed + 100, B, T, V, scale=scale)
    found, (to_teacher, _) = kl_and_gradients(k)(teacher, student)
    np.testing.assert_allclose(found, kl_by_hand(teacher, student, k), rtol=2e-5, atol=2e-6)
    assert not np.asarray(to_teacher).any()  # it is not trained


def test_kl_by_numbers():
    """Teacher (.5, .3, .1, .1), student (.25, .25, .25, .25), two tokens kept."""
    teacher = jax.jit(top_k, static_argnums=1)(np.log([[[0.5, 0.3, 0.1, 0.1]]]), 2)
    np.testing.assert_array_equal(teacher.ids_BTK, [[[0, 1]]])
    np.testing.assert_allclose(np.exp(teacher.logp_BTK), [[[0.5, 0.3]]], rtol=1e-6)
    np.testing.assert_allclose(np.exp(teacher.rest_BT), [[0.2]], rtol=1e-6)
    wanted = 0.5 * np.log(2) + 0.3 * np.log(1.2) + 0.2 * np.log(0.4)
    found = jax.jit(lumped_kl)(teacher, np.zeros((1, 1, 4), np.float32))
    np.testing.assert_allclose(found, [[wanted]], rtol=1e-6)


def test_keeping_more_tokens_only_adds_up_to_the_whole_kl():
    teacher, student = draw(1, B, T, V), draw(2, B, T, V)
    kls = [np.asarray(kl_and_gradients(k)(teacher, student)[0]) for k in KEPT]
    for less, more in itertools.pairwise(kls):
        assert (more >= less - 1e-6).all()
        assert (more > less + 1e-3).any()
    p, q = softmax(teacher), softmax(student)
    np.testing.assert_allclose(kls[-1], (p * np.log(p / q)).sum(-1), rtol=1e-5)


@pytest.mark.parametrize("k", KEPT)
def test_a_student_like_its_teacher_has_no_loss_and_no_gradient(k):
    logits = draw(3, B, T, V, scale=5.0)
    kl, (_, grad) = kl_and_gradients(k)(logits, logits)
    np.testing.assert_allclose(kl, 0, atol=1e-5)
    np.testing.assert_allclose(grad, 0, atol=1e-6)


def test_gradient_with_all_tokens_is_the_difference_of_probabilities():
    teacher, student = draw(4, B, T, V), draw(5, B, T, V)
    _, (_, grad) = kl_and_gradients(V)(teacher, student)
    np.testing.assert_allclose(grad, softmax(student) - softmax(teacher), atol=1e-6)


@pytest.mark.parametrize("k", KEPT)
@pytest.mark.parametrize("gap", [30.0, 80.0])
def test_certain_teachers_and_students_stay_finite(gap, k):
    """Beyond fp32's 1 - p: the rest is summed over the others, and p log p of nothing is 0."""
    sure = np.zeros((B, T, V), np.float32)
    sure[..., 2] = gap
    for teacher, student in ((sure, sure[..., ::-1].copy()), (sure, sure), (sure * 0, sure)):
        kl, (_, grad) = kl_and_gradients(k)(teacher, student)
        np.testing.assert_allclose(kl, kl_by_hand(teacher, student, k), rtol=1e-5, atol=1e-6)
        assert np.isfinite(grad).all()


# ---- the loss of a batch ------------------------------------------------------------------------


def batch(seed):
    """hidden, head, and the same of the teacher; mask."""
    mask = (np.random.default_rng(seed).random((B, T)) < 0.6).astype(np.int32)
    mask[0, :3], mask[1, :3] = 1, 0
    hidden, head = draw(seed, B, T, D), draw(seed + 1, D, V)
    return hidden, head, draw(seed + 2, B, T, D), draw(seed + 3, D, V), mask


@functools.cache
def loss_and_gradients(chunk):
    """(hidden, head, teacher, mask, denominator) -> loss, gradients of hidden and head."""
    return jax.jit(jax.value_and_grad(functools.partial(distillation_loss, chunk=chunk), (0, 1)))


@functools.cache
def teacher_in_chunks(k, chunk):
    return jax.jit(lambda hidden, head: chunked_top_k(hidden, head, k, chunk))


@pytest.mark.parametrize(("k", "chunk"), [(4, 3), (V, 128)])
def test_loss_and_gradient_are_numpys(k, chunk):
    hidden, head, teacher_hidden, teacher_head, mask = batch(10)
    count = np.float32(17)  # of the whole batch, of which this is a part
    teacher = teacher_in_chunks(k, chunk)(teacher_hidden, teacher_head)
    value, grads = loss_and_gradients(chunk)(hidden, head, teacher, mask, count)
    logits = np.float64(teacher_hidden) @ np.float64(teacher_head)

    def by_hand(x, w):
        return (kl_by_hand(logits, x @ w, k) * mask).sum() / 17

    inputs = [np.float64(hidden), np.float64(head)]
    np.testing.assert_allclose(value, by_hand(*inputs), rtol=1e-5)
    for which, grad in enumerate(grads):
        wanted = np.zeros(grad.shape)
        for at in np.ndindex(grad.shape):
            ends = []
            for step in (1e-5, -1e-5):
                moved = [x.copy() for x in inputs]
                moved[which][at] += step
                ends.append(by_hand(*moved))
            wanted[at] = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(grad, wanted, rtol=1e-4, atol=1e-6)


def test_teacher_in_chunks_is_the_teacher():
    _, _, hidden, head, _ = batch(20)
    whole = jax.jit(top_k, static_argnums=1)(hidden @ head, 4)
    found = teacher_in_chunks(4, 3)(hidden, head)
    np.testing.assert_array_equal(found.ids_BTK, whole.ids_BTK)
    np.testing.assert_allclose(found.logp_BTK, whole.logp_BTK, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.rest_BT, whole.rest_BT, rtol=1e-5, atol=1e-6)


def test_shares_of_micro_batches_add_up_to_the_batch():
    """Each half of the batch once, with the other half out of the mask."""
    hidden, head, teacher_hidden, teacher_head, mask = batch(30)
    teacher = teacher_in_chunks(4, 3)(teacher_hidden, teacher_head)
    count = np.float32(mask.sum())
    assert mask[0].sum() != mask[1].sum()
    run = loss_and_gradients(3)
    whole, grads = run(hidden, head, teacher, mask, count)
    rows = np.arange(B)[:, None]
    parts = [run(hidden, head, teacher, mask * (rows == b), count) for b in range(B)]
    np.testing.assert_allclose(sum(loss for loss, _ in parts), whole, rtol=1e-6)
    for which in range(2):
        total = sum(np.asarray(part[which]) for _, part in parts)
        np.testing.assert_allclose(total, grads[which], rtol=1e-5, atol=1e-7)


def test_what_is_not_learned_is_not_read():
    hidden, head, teacher_hidden, teacher_head, mask = batch(40)
    teacher = teacher_in_chunks(4, 3)(teacher_hidden, teacher_head)
    count = np.float32(mask.sum())
    out = mask == 0
    broken = np.where(out[..., None], np.float32(np.nan), hidden)
    other = TopK(
        teacher.ids_BTK,
        np.where(out[..., None], np.float32(np.nan), teacher.logp_BTK),
        np.where(out, np.float32(np.nan), teacher.rest_BT),
    )
    run = loss_and_gradients(3)
    found, wanted = run(broken, head, other, mask, count), run(hidden, head, teacher, mask, count)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, wanted)
    assert not np.asarray(found[1][0])[out].any()


def test_no_array_holds_all_logits():
    rows, positions, vocabulary, chunk = 2, 64, 512, 4
    hidden, head = jnp.zeros((rows, positions, D)), jnp.zeros((D, vocabulary))

    def loss(hidden, head, teacher_hidden):
        teacher = chunked_top_k(teacher_hidden, head, 2, chunk)
        mask = jnp.ones((rows, positions))
        return distillation_loss(hidden, head, teacher, mask, jnp.float32(1), chunk)

    text = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, head, hidden).as_text()
    assert f"{rows}x{chunk}x{vocabulary}x" in text
    assert f"{rows}x{positions}x{vocabulary}x" not in text
    assert f"x{rows}x{chunk}x{vocabulary}x" not in text  # no stack of all chunks either


def test_bad_sizes_are_named():
    for k in (0, V + 1):
        with pytest.raises(ValueError, match=rf"k={k} tokens of the teacher; give 1\.\.{V}"):
            top_k(jnp.zeros((B, T, V)), k)
    with pytest.raises(ValueError, match="chunk is 0"):
        chunked_top_k(jnp.zeros((B, T, D)), jnp.zeros((D, V)), 1, 0)

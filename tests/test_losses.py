"""TAL, CID and ID against the reference and against worked examples."""

import re

import golden_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itself_jax import losses

UNIT = golden_model.load("golden_unit_f32.npz")
GOLDEN = golden_model.load("golden_f32_mixed_s16.npz")
IMAGE, TEXT = jnp.asarray(UNIT["loss/image"]), jnp.asarray(UNIT["loss/text"])
PIDS = jnp.asarray(UNIT["loss/pids"].astype(np.int32))


@pytest.mark.parametrize("case", ("TAL_tau0.015_m0.1", "TAL_tau0.05_m0.3", "TAL_tau0.5_m0.0"))
def test_tal_and_its_gradients_are_the_references(case):
    temperature, margin = (float(x) for x in re.findall(r"[\d.]+", case))

    def loss(image, text):
        return losses.tal(image, text, PIDS, temperature=temperature, margin=margin)

    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(IMAGE, TEXT)
    golden_model.assert_close(value, UNIT[f"loss/{case}"], 5e-6)
    golden_model.assert_close(gradients[0], UNIT[f"loss/{case}/grad_image"], 1e-4)
    golden_model.assert_close(gradients[1], UNIT[f"loss/{case}/grad_text"], 1e-4)


def test_hard_negatives_are_the_references():
    negatives = losses.hard_negatives(IMAGE, TEXT, PIDS)
    np.testing.assert_array_equal(negatives.image, UNIT["loss/visual_negatives"])
    np.testing.assert_array_equal(negatives.text, UNIT["loss/text_negatives"])


def by_pair(x: np.ndarray) -> np.ndarray:
    """Our order (matched, image negatives, text negatives) from the reference's, by i."""
    return np.asarray(x).reshape(-1, 3, *np.shape(x)[1:]).swapaxes(0, 1).reshape(np.shape(x))


def cid_inputs(image, text, pids, rule="batch_max"):
    """What `losses.cid` classifies, and the labels it compares with, observed from outside.

    Each pair's logits are zero but for one class; the loss then tells the label of that pair.
    """
    seen = []

    def pair_logits(first, second):
        orders = (x.reshape(2, -1, x.shape[-1]) for x in (first, second))
        seen.extend(zip(*orders, strict=True))
        return jnp.zeros((*first.shape[:-1], 14))

    mismatch = losses.mismatch_label(pids, 13, rule)
    losses.cid(image, text, pids, pair_logits, mismatch=mismatch)
    return seen


def test_the_pairs_of_cid_are_the_references_in_both_orders():
    forward, backward = cid_inputs(IMAGE, TEXT, PIDS)
    images = IMAGE[by_pair(UNIT["loss/pair_image_index"])]
    texts = TEXT[by_pair(UNIT["loss/pair_text_index"])]
    np.testing.assert_array_equal(forward[0], images)
    np.testing.assert_array_equal(forward[1], texts)
    np.testing.assert_array_equal(backward[0], texts)
    np.testing.assert_array_equal(backward[1], images)


def test_cid_with_the_references_logits_is_the_references():
    tables = [jnp.asarray(by_pair(UNIT[f"loss/logits{i}"])).reshape(3, 16, -1) for i in (1, 2)]
    both = jnp.concatenate(tables)  # of one order, then of the other
    mismatch = losses.mismatch_label(PIDS, 13, "batch_max")
    value = losses.cid(IMAGE, TEXT, PIDS, lambda *_: both, mismatch=mismatch)
    golden_model.assert_close(value, UNIT["loss/compute_cid"], 5e-6)


def test_labels_of_pairs_are_the_references():
    """Logits that are certain of the reference's labels cost nothing, so the labels are equal."""
    labels = by_pair(UNIT["loss/pair_labels"])
    logits = 100.0 * jax.nn.one_hot(labels, 14).reshape(3, 16, 14)
    mismatch = losses.mismatch_label(PIDS, 13, "batch_max")
    both = jnp.concatenate([logits, logits])
    value = losses.cid(IMAGE, TEXT, PIDS, lambda *_: both, mismatch=mismatch)
    assert float(value) < 1e-6
    assert labels[16:].tolist() == [int(mismatch)] * 32
    np.testing.assert_array_equal(labels[:16], PIDS)


def test_id_loss_is_the_references():
    logits = jnp.asarray(UNIT["loss/logits1"][:16])
    golden_model.assert_close(losses.cross_entropy(logits, PIDS), UNIT["loss/compute_id"], 5e-6)


@pytest.mark.parametrize("config", golden_model.CONFIGS)
def test_hard_negatives_and_labels_inside_the_model_are_the_references(config):
    run = golden_model.golden_run(config)
    pids = jnp.asarray(golden_model.batch()["pids"])
    for side, name in enumerate(("global", "grab")):
        image, text = (jnp.asarray(x.embedding[side]) for x in (run.image, run.text))
        negatives = losses.hard_negatives(image, text, pids)
        expected = {k: GOLDEN[f"stable/{config}/neg_{k}_{name}"] for k in ("visual", "text")}
        np.testing.assert_array_equal(negatives.image, expected["visual"])
        np.testing.assert_array_equal(negatives.text, expected["text"])
        labels = by_pair(GOLDEN[f"stable/{config}/pair_labels_{name}"])
        mismatch = int(losses.mismatch_label(pids, 7, "batch_max"))
        np.testing.assert_array_equal(labels, [*pids.tolist(), *[mismatch] * 16])


# --- worked examples -------------------------------------------------------------------------


def test_tal_by_hand():
    """Two orthogonal identities, images = texts = unit vectors: S = I. τ = 1, margin 0.5. Each row
    has one positive (S = 1, α = 1) and one negative (S = 0): ℓ = max(0, .5 - 1 + log e⁰) = 0. At
    margin 2 each of the four rows (two directions) costs 1."""
    eye = 3.0 * jnp.eye(2)  # norms do not matter
    pids = jnp.array([0, 1])
    assert float(losses.tal(eye, eye, pids, temperature=1.0, margin=0.5)) == 0
    assert float(losses.tal(eye, eye, pids, temperature=1.0, margin=2.0)) == pytest.approx(4.0)


def test_tal_weighs_several_positives_by_their_softmax():
    """Texts 0 and 1 of one identity, 2 of another; S = T·Iᵀ with images e1, e1, e2 and texts
    e1, e2, e2. Row 0: S = 1 1 0; positives 1, 1: attraction 1, negative 0: ℓ = m - 1.
    Row 1: S = 0 0 1: attraction 0, negative 1: ℓ = m + 1. Row 2: S = 0 0 1, positive 1, negatives
    0, 0: m - 1 + log 2. Columns 0, 1: S = 1 0 0; α = (e, 1)/(e + 1), attraction e/(e + 1),
    negative 0: m - e/(e + 1), twice. Column 2: S = 0 1 1; positive 1, negatives 0, 1:
    m - 1 + log(1 + e). m = 2 keeps all above zero."""
    e1, e2 = jnp.eye(2)
    image, text = jnp.stack([e1, e1, e2]), jnp.stack([e1, e2, e2])
    e = np.e
    rows = [1.0, 3.0, 1 + np.log(2)]
    columns = [2 - e / (e + 1), 2 - e / (e + 1), 1 + np.log(1 + e)]
    value = losses.tal(image, text, jnp.array([4, 4, 1]), temperature=1.0, margin=2.0)
    assert float(value) == pytest.approx(sum(rows) + sum(columns), rel=1e-6)


def test_tal_is_a_sum_over_the_batch():
    """Every row of an independent, equally hard pair of identities adds the same."""
    one = losses.tal(jnp.eye(2), jnp.eye(2), jnp.array([0, 1]), temperature=0.5, margin=3.0)
    # Four identities in two orthogonal planes: three negatives at 0 rather than one.
    four = losses.tal(jnp.eye(4), jnp.eye(4), jnp.arange(4), temperature=0.5, margin=3.0)
    assert float(one) == pytest.approx(4 * 2.0, rel=1e-6)
    assert float(four) == pytest.approx(8 * (2.0 + 0.5 * np.log(3)), rel=1e-6)


def test_no_gradient_flows_through_alpha():
    """The gradient is that of a loss whose α was computed elsewhere."""
    image, text = IMAGE[:6], TEXT[:6]
    pids = jnp.array([0, 0, 0, 1, 1, 1])
    positive = pids[:, None] == pids[None, :]

    def cosine(image, text):
        unit = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
        return jnp.einsum("id,td->ti", *unit)

    frozen = cosine(image, text)

    def loss(image, text):
        total = 0.0
        for s, s0 in ((cosine(image, text), frozen), (cosine(image, text).T, frozen.T)):
            alpha = jax.nn.softmax(jnp.where(positive, s0 / 0.5, -jnp.inf), axis=1)
            others = jnp.where(positive, -jnp.inf, s / 0.5)
            total += jnp.sum(1 - (alpha * s).sum(axis=1) + 0.5 * jax.nn.logsumexp(others, axis=1))
        return total

    ours = jax.grad(lambda i: losses.tal(i, text, pids, temperature=0.5, margin=1.0))
    golden_model.assert_close(jax.jit(ours)(image), jax.jit(jax.grad(loss))(image, text), 1e-5)


def test_a_batch_of_one_identity_has_finite_losses_and_gradients():
    """TAL is 0. CID, without negatives, counts the matched pairs alone: uniform logits over 14
    classes cost log 14, and logits certain of the identity nothing."""
    pids = jnp.full(16, 3)
    value, gradient = jax.jit(jax.value_and_grad(lambda i: losses.tal(i, TEXT, pids)))(IMAGE)
    assert float(value) == 0
    assert (np.asarray(gradient) == 0).all()

    def cid(image, logits):
        def pair_logits(first, second):
            return logits + 0.0 * (first.sum() + second.sum())

        return losses.cid(image, TEXT, pids, pair_logits, mismatch=jnp.array(4))

    uniform, gradient = jax.jit(jax.value_and_grad(cid))(IMAGE, jnp.zeros((6, 16, 14)))
    assert float(uniform) == pytest.approx(np.log(14), rel=1e-6)
    assert np.isfinite(gradient).all()
    certain = 50.0 * jax.nn.one_hot(jnp.full((6, 16), 3), 14)
    assert float(cid(IMAGE, certain)) < 1e-6


def test_hard_negatives_by_hand():
    """Identities 0 0 1. Text 0 is nearest to image 1 (same identity): its hardest other is 2."""
    image = jnp.array([[1.0, 0.0], [0.9, 0.1], [0.5, 0.5]])
    text = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.4]])
    negatives = losses.hard_negatives(image, text, jnp.array([0, 0, 1]))
    # Text 2 (0.6, 0.4) has cosine .832 with image 0 and .888 with image 1.
    np.testing.assert_array_equal(negatives.image, [2, 2, 1])
    # Image 2 (.5, .5) has cosine .707 with both texts of the other identity: the lower index.
    np.testing.assert_array_equal(negatives.text, [2, 2, 0])


def test_mismatch_labels_of_both_rules():
    """The reference's is the largest pid of the batch + 1: here the class of a real identity."""
    pids = jnp.array([2, 2, 0, 5])
    assert int(losses.mismatch_label(pids, 11, "batch_max")) == 6
    assert int(losses.mismatch_label(pids, 11, "extra_class")) == 11


def test_cross_entropy_by_hand():
    """Logits (0, log 3): probabilities ¼ and ¾; labels 0, 1: (log 4 + log 4/3)/2."""
    logits = jnp.log(jnp.array([[1.0, 3.0], [1.0, 3.0]]))
    labels = jnp.array([0, 1])
    assert float(losses.cross_entropy(logits, labels)) == pytest.approx(np.log(16 / 3) / 2)
    weighted = losses.cross_entropy(logits, labels, jnp.array([1.0, 3.0]))
    assert float(weighted) == pytest.approx((np.log(4) + 3 * np.log(4 / 3)) / 4)


def test_gradients_flow_through_the_negatives_of_cid():
    """Image 2 is the hardest negative of texts 0 and 1 and enters their pairs in the
    second third: a classifier that looks at these two alone moves image 2 and no other."""
    pids = jnp.array([0, 0, 1])

    def loss(image):
        def pair_logits(first, second):
            looked_at = jnp.zeros((6, 3, 1)).at[1, :2].set(1.0)
            return jnp.square(first[..., :2]) * looked_at + 0.0 * second[..., :2]

        return losses.cid(image, TEXT[:3], pids, pair_logits, mismatch=jnp.array(1))

    gradient = np.abs(jax.jit(jax.grad(loss))(IMAGE[:3])).sum(axis=1)
    assert gradient[2] > 1e-3
    assert (gradient[:2] == 0).all()


def test_losses_are_float32_whatever_the_embeddings_are():
    branch = losses.branch(
        IMAGE.astype(jnp.bfloat16),
        TEXT.astype(jnp.bfloat16),
        PIDS,
        pair_logits=lambda a, b: a[..., :14] + b[..., :14],
        identity_logits=lambda x: x[..., :14],
        mismatch=jnp.array(13),
    )
    assert {value.dtype for value in branch} == {jnp.dtype(jnp.float32)}

"""Weights of one run in the model of another."""

import jax
import numpy as np
import pytest

from itself_jax import checkpoint, weights

DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def variables(identities=5, *, length=30, width=4, local=True):
    rng = np.random.default_rng(identities + length)

    def array(*shape):
        return rng.normal(size=shape).astype(np.float32)

    params = {
        "text_encoder": {"position_embedding": array(length, 3), "projection": array(3, width)},
        "global_heads": {"identity_classifier": {"kernel": array(width, identities + 1)}},
    }
    if local:
        params["local_heads"] = {"identity_classifier": {"kernel": array(6, identities + 1)}}
    return {"params": params, "batch_stats": {"text_grab": {"mean": array(6)}}}


def template(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=DEVICE), tree)


def loaded(tree, tmp_path, log=print):
    """`tree` saved by a run and read back."""
    state = {"step": np.int32(3), **tree}
    with checkpoint.Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(3, state, {"score": 1.0, "epoch": 1, "best_alpha": 0.3})
    return weights.read(tmp_path, log)


def test_weights_of_the_same_model_arrive_bit_for_bit_where_the_template_says(tmp_path):
    given = variables()
    found = loaded(given, tmp_path)
    assert (found.num_identities, found.meta["epoch"]) == (5, 1)
    log = []
    fitted = weights.fit(found, template(given), log.append)
    assert jax.tree.structure(fitted) == jax.tree.structure(given)
    for got, want in zip(jax.tree.leaves(fitted), jax.tree.leaves(given), strict=True):
        assert isinstance(got, jax.Array) and got.sharding == DEVICE
        np.testing.assert_array_equal(got, want)
    assert log == []


def test_classifiers_of_other_identities_start_anew_and_say_so(tmp_path):
    found, fresh, log = loaded(variables(5), tmp_path), variables(8), []
    fitted = weights.fit(found, template(fresh), log.append, fresh=fresh)
    for branch in ("global_heads", "local_heads"):
        np.testing.assert_array_equal(
            fitted["params"][branch]["identity_classifier"]["kernel"],
            fresh["params"][branch]["identity_classifier"]["kernel"],
        )
    np.testing.assert_array_equal(
        fitted["params"]["text_encoder"]["projection"],
        found.variables["params"]["text_encoder"]["projection"],
    )
    assert len(log) == 1 and "knows 5 identities" in log[0] and "start anew" in log[0]


def test_classifiers_of_other_identities_are_an_error_without_fresh_ones(tmp_path):
    found = loaded(variables(5), tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match=r"global_heads.* \[4, 6\].* \[4, 9\]"):
        weights.fit(found, template(variables(8)), print)


@pytest.mark.parametrize("length, word", [(24, "cut"), (50, "stretched behind the first 20")])
def test_text_positions_follow_the_text_length_with_one_line(tmp_path, length, word):
    found, log = loaded(variables(), tmp_path), []
    fitted = weights.fit(found, template(variables(length=length)), log.append)
    before = found.variables["params"]["text_encoder"]["position_embedding"]
    after = np.asarray(fitted["params"]["text_encoder"]["position_embedding"])
    assert after.shape == (length, 3)
    np.testing.assert_array_equal(after[:20], before[:20])
    if length < 30:
        np.testing.assert_array_equal(after, before[:length])
    else:
        # Ten rows became thirty: output i lies at (i + 0.5) / 3 - 0.5 of the old tail.
        np.testing.assert_allclose(after[21], before[20], rtol=1e-6)
        np.testing.assert_allclose(after[22], (2 * before[20] + before[21]) / 3, rtol=1e-5)
    assert len(log) == 1 and word in log[0] and f"model.text_length={length}" in log[0]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"width": 7}, r"projection is \[3, 4\] there and \[3, 7\] here"),
        ({"local": False}, r"local_heads/.* is \[6, 6\] there and absent here"),
    ],
)
def test_another_model_is_an_error_naming_the_array_and_both_shapes(tmp_path, change, message):
    found, fresh = loaded(variables(), tmp_path), variables(**change)
    with pytest.raises(checkpoint.CheckpointError, match=message):
        weights.fit(found, template(fresh), print, fresh=fresh)


def test_positions_without_a_tail_cannot_be_stretched(tmp_path):
    found = loaded(variables(length=20), tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match=r"position_embedding is \[20, 3\] there"):
        weights.fit(found, template(variables(length=30)), print)

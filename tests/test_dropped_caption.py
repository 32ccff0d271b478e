"""What stands for a caption that is dropped in training."""

import numpy as np
import pytest
from drawn import T5_CONFIG, draw
from etils import epath
from model_folder import make_model
from small_run import make_config

from cogvideox_jax.conversion.folder import open_model
from cogvideox_jax.models.graphs import graph_of
from cogvideox_jax.models.t5 import T5Encoder, encode_text
from cogvideox_jax.training import stage_data


@pytest.mark.parametrize("drop", ["zeros", "empty"])
def test_it_is_zeros_or_the_states_of_the_empty_prompt(tmp_path, drop):
  folder = epath.Path(tmp_path)
  model = make_model(folder / "model")
  dropped = stage_data.dropped_caption(make_config(folder, text__drop=drop))
  if drop == "zeros":
    assert isinstance(dropped, str) and dropped == "zeros"
    return
  ids = open_model(model).tokenizer().encode([""], 6)
  expected = encode_text(
    draw(T5Encoder, T5_CONFIG)[1], ids, graphdef=graph_of(T5Encoder, T5_CONFIG)
  )
  np.testing.assert_allclose(dropped, expected[0], atol=1e-6)
  assert np.abs(dropped).max() > 0.1

"""Pure loss functions of arrays; they import jax alone."""

#: Losses of two towers by name, each (text, image, *, where, ...) with any of the keyword arguments
#: temperature, bias, labels and chunk_size: what `config.method` or `config.loss.function` names.
LOSSES = {
    "clip": "rcml_jax.losses.clip:clip",
    "siglip": "rcml_jax.losses.siglip:sigmoid",
    "unicl": "rcml_jax.losses.unicl:label_supervised",
}

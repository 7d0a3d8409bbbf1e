"""The networks between encoders and decoder heads. A module in this package is found by itself.

A backbone is built by `Backbone(in_channels, size, preset, **options)` and called by `backbone(x, embedding,
tokens=None) -> Features`. It tells its denoiser three sizes: `embedding_channels` of the embedding of time
and roles, `feature_channels` of the map and `pooled_channels` of the pooled features it returns. Height and
width are those of x. One sample's features never depend on the other samples of the batch. It may name its
`layers`, parts that are each called as a whole: workers that share a model out then hold one of them at a
time, else all of it. Tokens come with modalities that have any (`Modality.tokens`); the denoiser then builds
the backbone with the option `token_channels`.
"""

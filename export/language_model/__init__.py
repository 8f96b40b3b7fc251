"""The `language_model` engine: a Llama decoder with a KV cache, written node by node (reference semantics §10).

`decoder` draws the graph around a flavour of `attention`, `formats` and `weights` say what its constants are, and
`writing` streams them from the checkpoint.

Contract, with B rows, S new positions, C cache capacity, D width, V vocabulary, H/K query/key heads, d head width:

    inputs_embeds [B, S, D] float32     new positions, right-padded
    past_lengths  [B] int32             positions each row has in the cache
    new_lengths   [B] int32             real positions among the S, at least 1
    past_key_i, past_value_i            [B, K, C, d'], layer i
    logits [B, V] float32               at each row's last real position
    present_key_i, present_value_i      [B, K, C, d'], the same buffers as the past ones

d' is d rounded up to what the attention operator takes (official sizes: d' = d = 128). The widened part of a head is
zero in every weight, so it changes no result. The cache has the type that the graph computes in: float32, also for
integer weights on ONNX Runtime, else float16 or bfloat16.

The caller binds one buffer as past and present, so the cache is updated in place. Three kinds of call are right:
prefill (`past_lengths` all 0, any S, any `new_lengths` <= S), one token a row (S = 1, any `past_lengths`), and a
continuation with S > 1 of a single row without padding (B = 1, `new_lengths` = S). A padded position is written to
the cache behind the row's end and overwritten by the next token before anything reads it. C is at least every
row's past length + S and at most `max_positions`.

Three flavours of attention give the same results by the same contract.
"""

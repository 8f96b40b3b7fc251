"""The plain, slow, obviously right pipeline in torch: the runtime's independent judge.

Contract: `Reference` takes the requests of `runtime.requests` and any object with the methods of
`runtime.noise.Noise`, and returns the results of `runtime.requests`. Tokens are written by transformers' `generate`,
latents are denoised with diffusers' schedulers; from the runtime come only the vocabulary, the geometry, the texts of
prompts and the preparation of pictures and motion. With the same weights, request and seed the two pipelines differ
by rounding only. What both hold to where the model leaves a choice (reference semantics §10, §12 to §14):

Order of draws. Nothing else is drawn, and nothing for a step that needs no randomness.
  1. gumbel(pictures, N, 2) when pictures are given; a patch is kept iff argmax(keep_logits + gumbel) is 0 (§6.3);
  2. one choice(probabilities [1, n]) per sampled token, over the n allowed ids in ascending order of ids: image
     tokens first, then motion tokens; a greedy token draws nothing;
  3. key frame: normal(1, 4, h, w) for its starting latents, fresh or added to the last frame of the clip before
     (§8.3); then with Euler-ancestral normal(1, 4, h, w) for each step, also for the last where its factor is 0;
  4. clip: normal(1, 3, H, W) for the augmentation of the key frame, normal(1, T, 4, h, w) for its starting latents.
A video of several clips repeats 2 to 4.

Tokens.
  - No begin-of-sequence token before a prompt; the unconditional branch starts from the last prompt token alone.
  - Image ids end with image_end or at the longest length allowed; every id 2 is removed from them (Q10).
  - Motion ids are exactly as many motion codes as a clip has. Only codes can be written, and motion_end is appended
    afterwards: the same sequence as the official one whenever the model writes exactly that many codes.
  - `greedy` takes the arg-max in every phase. Otherwise image ids are sampled and motion ids are sampled if
    `sampled_motion` says so.
  - A prompt stands before a picture. The picture is wrapped in its markers for a video and bare for an image (§12.6).

Pixels.
  - init_noise_sigma is read after set_timesteps (Q5), and re-injected latents are not scaled a second time (Q6).
  - More visual tokens than the decoder has positions for are cut (Q4); no visual token at all is an error.
  - A key frame is resized to the size of the video whenever the two differ, also a given picture (Q16).
  - A chunk of frames never spans two videos (Q9).
  - Every clip has all its frames; a caller who joins clips drops the first frame of each later one (§12.4).
"""

from videolavit.reference.pipeline import Reference

__all__ = ["Reference"]

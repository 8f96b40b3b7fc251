"""Training data: where examples come from, how they are tokenised once, and how the tokens are read back.

Contract: a `Source` gives raw pictures and clips with their captions and questions, each a pure function of its index
(`open_source`). `videolavit tokenize` runs the frozen tokenizers over a source once and writes shards; a
`TokenizedDataset` (`videolavit.training.data.tokenized`, which needs torch) reads them back item by item.
"""

from videolavit.training.data.examples import ClipExample, PictureExample, Question, Source
from videolavit.training.data.opening import open_source

__all__ = ["ClipExample", "PictureExample", "Question", "Source", "open_source"]

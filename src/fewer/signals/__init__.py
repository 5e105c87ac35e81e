"""What a method can ask a host to gather while the model runs, beside keys and values: its `needs`.

Each need is a small frozen dataclass; `start` gives an observer, which the host feeds with every forward step that the
policy observes. The attention function sees the rotated queries of every model family, so no need knows a model.

    Queries(last=64)      the last real queries of each row           -> QueryWindow
    Probes(share=0.05)    a few queries that stand for a forward's    -> ProbeQueries
    Received(decay=1.0)   attention each key got from all queries     -> Tensor (b, h, n)
    Moments(skip=4)       mean and covariance of unrotated queries    -> QueryMoments
    ChannelMaxima()       largest queries and keys, by channel        -> Maxima
    Rotation()            the model's rotary position embedding       -> Rotary
    Projection()          the layer's output projection               -> OutputWeight
    EveryLayer()          the scores of all layers, before any is cut -> LayerScores

Others stand with what they are for:

    visual                what surrounds a cut in a vision-language model, and which entries of its cache are visual
    heads, aside          Heads, of an encoder's block; Dynamic, what decoding steps leave unread
    score.surrogate       Hidden, Predicted: hidden states, and scores that are predicted from them
    score.reconstruction  Reconstruction: what the model looks at when it repeats its prompt
    score.copying         Copying: which heads copy
    methods.kv.dapq       Pseudo: queries of tokens still to come
    methods.kv.ems        Seers: which queries were observed
    methods.kv.razorattention    Mass: what each kept key counts as

A need may also say, as class attributes, what it takes from the host:

    hidden = True         `Step.hidden`, the hidden states that the layer's attention was given
    probe = True          that the model be run once more before anything is dropped: `inputs` names the tokens, and
                          `observe_probe` of its observer sees the layers read them (`Probing`)
    everywhere = True     that no layer is cut before all have their scores
"""

from fewer.signals.model import EveryLayer, LayerScores, OutputWeight, Projection, Rotation
from fewer.signals.moments import ChannelMaxima, Maxima, Moments, QueryMoments
from fewer.signals.queries import ProbeQueries, Probes, Queries, QueryWindow
from fewer.signals.received import PerKey, Received
from fewer.signals.step import BLOCK_CELLS, Observer, Probing, Rotary, Step, blank, marked_last

ROTARY_NEEDS = (Moments, Rotation)
"""Needs that only a host with rotary positions can give."""

__all__ = [
    "BLOCK_CELLS",
    "ROTARY_NEEDS",
    "ChannelMaxima",
    "EveryLayer",
    "LayerScores",
    "Maxima",
    "Moments",
    "Observer",
    "OutputWeight",
    "PerKey",
    "ProbeQueries",
    "Probes",
    "Probing",
    "Projection",
    "Queries",
    "QueryMoments",
    "QueryWindow",
    "Received",
    "Rotary",
    "Rotation",
    "Step",
    "blank",
    "marked_last",
]

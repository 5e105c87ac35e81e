"""METHODS: a plain dict, name -> class. Names are for the command line; objects work everywhere."""

import re
from difflib import get_close_matches
from typing import Any

from fewer.allocate.levels import Levels
from fewer.codec import Codec
from fewer.methods.any.full import Full
from fewer.methods.any.random import Random
from fewer.methods.any.uniform import Uniform
from fewer.methods.kv.a2sf import A2SF
from fewer.methods.kv.adakv import AdaKV
from fewer.methods.kv.compresskv import CompressKV
from fewer.methods.kv.criticalkv import CriticalKV
from fewer.methods.kv.dapq import DapQ
from fewer.methods.kv.ems import EMS
from fewer.methods.kv.expected_attention import ExpectedAttention
from fewer.methods.kv.fastkv import FastKV
from fewer.methods.kv.gear import GEAR
from fewer.methods.kv.h2o import H2O
from fewer.methods.kv.keydiff import KeyDiff
from fewer.methods.kv.kivi import KIVI
from fewer.methods.kv.knorm import KNorm
from fewer.methods.kv.kvzap import KVzap
from fewer.methods.kv.kvzip import KVzip
from fewer.methods.kv.lagkv import LagKV
from fewer.methods.kv.merge_evict import MergeEvict
from fewer.methods.kv.mikv import MiKV
from fewer.methods.kv.minicache import MiniCache
from fewer.methods.kv.pyramidkv import PyramidKV
from fewer.methods.kv.razorattention import RazorAttention
from fewer.methods.kv.scissorhands import Scissorhands
from fewer.methods.kv.sinklora import SinkLoRA
from fewer.methods.kv.snapkv import SnapKV
from fewer.methods.kv.streaming_llm import StreamingLLM
from fewer.methods.kv.tidaldecode import TidalDecode
from fewer.methods.kv.tova import TOVA
from fewer.methods.kv.treekv import TreeKV
from fewer.methods.kv.zipcache import ZipCache
from fewer.methods.kv.zipvl import ZipVL
from fewer.methods.prompt.bm25 import BM25
from fewer.methods.prompt.exit import EXIT
from fewer.methods.prompt.llmlingua import LLMLingua
from fewer.methods.prompt.llmlingua2 import LLMLingua2
from fewer.methods.prompt.longcodezip import LongCodeZip
from fewer.methods.prompt.longllmlingua import LongLLMLingua
from fewer.methods.prompt.provence import Provence
from fewer.methods.prompt.recomp_extractive import RECOMPExtractive
from fewer.methods.prompt.scope import SCOPE
from fewer.methods.prompt.selective_context import SelectiveContext
from fewer.methods.prompt.statistical import Statistical
from fewer.methods.prompt.tcra import TCRA
from fewer.methods.prompt.truncation import Truncation
from fewer.methods.vit.algm import ALGM
from fewer.methods.vit.ats import ATS
from fewer.methods.vit.code_token_merging import CodeTokenMerging
from fewer.methods.vit.diffrate import DiffRate
from fewer.methods.vit.dpc_knn import DPCKNN
from fewer.methods.vit.evit import EViT
from fewer.methods.vit.expedit import Expedit
from fewer.methods.vit.mctf import MCTF
from fewer.methods.vit.pitome import PiToMe
from fewer.methods.vit.pooling import Pooling
from fewer.methods.vit.tofu import ToFu
from fewer.methods.vit.token_transforming import TokenTransforming
from fewer.methods.vit.tome import ToMe
from fewer.methods.vit.topk import TopK
from fewer.methods.vit.turbo import Turbo
from fewer.methods.vit.ward import Ward
from fewer.methods.vit.zero_tprune import ZeroTPrune
from fewer.methods.vlm.apet import ApET
from fewer.methods.vlm.cdpruner import CDPruner
from fewer.methods.vlm.cmai import CMAI
from fewer.methods.vlm.dart import DART
from fewer.methods.vlm.divprune import DivPrune
from fewer.methods.vlm.downsampled_image import DownsampledImage
from fewer.methods.vlm.dycoke import DyCoke
from fewer.methods.vlm.embedlens import EmbedLens
from fewer.methods.vlm.evs import EVS
from fewer.methods.vlm.fastv import FastV
from fewer.methods.vlm.feather import Feather
from fewer.methods.vlm.feature_norm import FeatureNorm
from fewer.methods.vlm.fourier_vlm import FourierVLM
from fewer.methods.vlm.globalcom2 import GlobalCom2
from fewer.methods.vlm.mini_monkey import MiniMonkey
from fewer.methods.vlm.mustdrop import MustDrop
from fewer.methods.vlm.pyramiddrop import PyramidDrop
from fewer.methods.vlm.recoverable_compression import RecoverableCompression
from fewer.methods.vlm.sparsevlm import SparseVLM
from fewer.methods.vlm.tokencorr import TokenCorr
from fewer.methods.vlm.ts_llava import TSLLaVA
from fewer.methods.vlm.vidcom2 import VidCom2
from fewer.methods.vlm.visionzip import VisionZip
from fewer.methods.vlm.vispruner import VisPruner
from fewer.methods.vlm.visual_pooling import VisualPooling
from fewer.methods.vlm.vmtc import VMTC
from fewer.methods.vlm.vtc_cls import VTCCLS
from fewer.prompts.source import PromptMethod
from fewer.types import Method, UnknownName

METHODS: dict[str, type[Any]] = {
    "full": Full,
    "random": Random,
    "uniform": Uniform,
    "streaming-llm": StreamingLLM,
    "razorattention": RazorAttention,
    "knorm": KNorm,
    "keydiff": KeyDiff,
    "lagkv": LagKV,
    "tova": TOVA,
    "h2o": H2O,
    "a2sf": A2SF,
    "sinklora": SinkLoRA,
    "scissorhands": Scissorhands,
    "treekv": TreeKV,
    "merge-evict": MergeEvict,
    "ems": EMS,
    "snapkv": SnapKV,
    "fastkv": FastKV,
    "dapq": DapQ,
    "compresskv": CompressKV,
    "pyramidkv": PyramidKV,
    "adakv": AdaKV,
    "criticalkv": CriticalKV,
    "expected-attention": ExpectedAttention,
    "kvzip": KVzip,
    "kvzap": KVzap,
    "kivi": KIVI,
    "gear": GEAR,
    "zipcache": ZipCache,
    "zipvl": ZipVL,
    "mikv": MiKV,
    "minicache": MiniCache,
    "tidaldecode": TidalDecode,
    "tome": ToMe,
    "mctf": MCTF,
    "diffrate": DiffRate,
    "topk": TopK,
    "pooling": Pooling,
    "dpc-knn": DPCKNN,
    "token-transforming": TokenTransforming,
    "expedit": Expedit,
    "evit": EViT,
    "ats": ATS,
    "zero-tprune": ZeroTPrune,
    "tofu": ToFu,
    "pitome": PiToMe,
    "ward": Ward,
    "algm": ALGM,
    "turbo": Turbo,
    "code-token-merging": CodeTokenMerging,
    "downsampled-image": DownsampledImage,
    "fastv": FastV,
    "cmai": CMAI,
    "dart": DART,
    "feather": Feather,
    "mini-monkey": MiniMonkey,
    "mustdrop": MustDrop,
    "pyramiddrop": PyramidDrop,
    "sparsevlm": SparseVLM,
    "visionzip": VisionZip,
    "divprune": DivPrune,
    "cdpruner": CDPruner,
    "apet": ApET,
    "feature-norm": FeatureNorm,
    "visual-pooling": VisualPooling,
    "fourier-vlm": FourierVLM,
    "embedlens": EmbedLens,
    "vidcom2": VidCom2,
    "evs": EVS,
    "dycoke": DyCoke,
    "ts-llava": TSLLaVA,
    "vispruner": VisPruner,
    "vtc-cls": VTCCLS,
    "globalcom2": GlobalCom2,
    "recoverable-compression": RecoverableCompression,
    "vmtc": VMTC,
    "tokencorr": TokenCorr,
    "truncation": Truncation,
    "tcra": TCRA,
    "provence": Provence,
    "llmlingua": LLMLingua,
    "llmlingua2": LLMLingua2,
    "longllmlingua": LongLLMLingua,
    "selective-context": SelectiveContext,
    "statistical": Statistical,
    "recomp-extractive": RECOMPExtractive,
    "exit": EXIT,
    "bm25": BM25,
    "longcodezip": LongCodeZip,
    "scope": SCOPE,
}


def family_of(known: type[Any]) -> str:
    """What a method's class shortens: "kv" caches, "vit" the tokens of encoders, "vlm" visual tokens, "prompt" texts,
    "any" all of them."""
    return known.__module__.split(".")[2] if known.__module__.startswith("fewer.methods.") else "any"


def of_family(family: str) -> dict[str, type[Any]]:
    """The methods of one family, and those that serve any."""
    return {name: known for name, known in METHODS.items() if family_of(known) in (family, "any")}


def resolve(method: str | Method) -> Method:
    """The method of that name with its published defaults, or the object itself. Methods that store in fewer bits also
    go by their name with the bits, as in "kivi-2bit".

    >>> resolve("snapkv")
    SnapKV(window=64, kernel=5, pooling='mean')
    """
    if isinstance(method, str):
        found = None if method in METHODS else re.fullmatch(r"(.+)-(\d+)bit", method)
        known = METHODS.get(found.group(1) if found else method)
        settings = {"bits": int(found.group(2))} if found else {}
        if known is None or (settings and "bits" not in getattr(known, "__dataclass_fields__", {})):
            raise UnknownName(f"there is no method {method!r}; {_meant(method, METHODS)}")
        if family_of(known) == "prompt":
            raise UnknownName(f"{method!r} shortens texts, not what a model holds: {_PROMPTS}")
        made: Method = known(**settings)
        return made
    if isinstance(method, PromptMethod) and not isinstance(method, (type, Method)):
        raise UnknownName(f"method={method!r} shortens texts, not what a model holds: {_PROMPTS}")
    if isinstance(method, type) or not isinstance(method, Method):
        raise UnknownName(f"method={method!r} is neither a name nor an object with needs, score, allocate and reduce")
    return method


def _meant(name: str, able: dict[str, Any]) -> str:
    """What to write in the place of a name that does not exist: those near it, or else all that do."""
    near = get_close_matches(name.lower(), able, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(able)}"


_PROMPTS = "give the text to fewer.compress_prompt(text, method, keep=...)"


def resolve_prompt(method: str | PromptMethod) -> PromptMethod:
    """The prompt method of that name with its defaults, or the object itself."""
    able = of_family("prompt")
    if isinstance(method, str):
        if method not in able:
            raise UnknownName(f"there is no prompt method {method!r}; {_meant(method, able)}")
        made: PromptMethod = able[method]()
        return made
    if isinstance(method, type) or not isinstance(method, PromptMethod):
        raise UnknownName(f"method={method!r} is neither a name nor an object with rank")
    return method


def resolve_store(store: "str | Codec | None") -> "Codec | None":
    """The storage that a method of that name keeps its tokens in, the object itself, or None for full precision."""
    if store is None or (isinstance(store, Codec) and not isinstance(store, type)):
        return store
    if not isinstance(store, str):
        raise UnknownName(f"store={store!r} is neither a name such as 'kivi-4bit' nor a Codec")
    try:
        stores = list(getattr(resolve(store), "store", ()))
    except UnknownName:
        stores = []
    if len(stores) != 1 or stores[0] is None:
        able = [name for name, known in METHODS.items() if getattr(known, "storage", False)]
        raise UnknownName(f"store={store!r} names no form of storage for all tokens; known are {', '.join(able)}")
    codec: Codec = stores[0]
    return codec


def name_of(method: Any) -> str:
    """The registered name of a method's class, with its bits where it has any, or the class's own name."""
    method = method.method if isinstance(method, Levels) else method
    name = next((name for name, known in METHODS.items() if type(method) is known), type(method).__name__)
    bits = getattr(method, "bits", None)
    return name if bits is None else f"{name}-{bits}bit"

"""Which tokenizer class transformers makes of a checkpoint folder.

What it is: the choice of AutoTokenizer (transformers 5), from tokenizer_config.json's `tokenizer_class` and config.json's `model_type`, as
tables and one function. It matters because some classes take from tokenizer.json no more than its vocabulary, merges and post-processor and
make everything else anew (rebuild.py); the others, and all names that are not known, take the file as it is.
What it does not know: what the classes do, tokens, ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

AS_IT_IS = "TokenizersBackend"
"""The class that takes tokenizer.json as it is."""
OTHER = "another"
"""Stands for every class of FOREIGN in REGISTERED: there it only matters that it is none of those that are known here."""

_FAMILIES = {
    "BartTokenizer": "florence2",
    "BertTokenizer": "align bark bert blip bros chinese_clip convbert distilbert electra ernie flava git grounding-dino layoutlm megatron-bert "
    "mm-grounding-dino nomic_bert squeezebert tvp vilt visual_bert",
    "CohereTokenizer": "aya_vision cohere cohere2",
    "GPT2Tokenizer": "blip-2 codegen dbrx emu3 gpt-sw3 gpt2 gpt_neo gptj hyperclovax_vision_v2 instructblip instructblipvideo jais2 opt phi "
    "starcoder2",
    "GPTNeoXTokenizer": "falcon_mamba gpt_neox mamba mamba2 mpt olmo olmoe rwkv xlstm",
    "GemmaTokenizer": "diffusion_gemma gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text recurrent_gemma shieldgemma2 t5gemma zaya",
    "LEDTokenizer": "led",
    "LlamaTokenizer": "idefics idefics2",
    "LxmertTokenizer": "lxmert",
    "MobileBertTokenizer": "mobilebert",
    "MvpTokenizer": "mvp",
    "ParakeetTokenizer": "granite_speech5_ctc nemotron3_5_asr nemotron_asr_streaming parakeet_ctc parakeet_rnnt parakeet_tdt",
    "Qwen2Tokenizer": "audioflamingo3 colqwen2 cosmos3_omni dots3_note fun_asr_nano hunyuan_vl internvl lighton_ocr moss_transcribe_diarize ovis2 "
    "qianfan_ocr qwen2 qwen2_5_omni qwen2_5_vl qwen2_audio qwen2_moe qwen2_vl qwen3 qwen3_asr qwen3_moe qwen3_next qwen3_omni_moe "
    "qwen3_vl qwen3_vl_moe vibevoice",
    "Qwen3_5Tokenizer": "qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen4_exp",
    "RobertaTokenizer": "bart bridgetower clap data2vec-text ibert lilt longformer mra roberta roberta-prelayernorm",
    AS_IT_IS: "EvollaModel arctic aria beam bigbird_pegasus camembertv2-base canary chatlm cohere_asr ernie4_5 ernie4_5_moe flex_olmo fuyu "
    "glm glm4 glm4_moe glm4_moe_lite glm4v glm4v_moe glm_image glmasr got_ocr2 gpt_bigcode gradium_phonon_tts granite granitemoe "
    "granitemoehybrid granitemoeshared h2ovl_chat hyperclovax hyperclovax_vlm internlm2 internlm3 iquestcoder jamba kimi_k25 "
    "kimi_linear kosmos-2 llava llava_next mimo_v2_flash minicpm3 minicpm_ocr minicpmv minicpmv4_6 minicpmv4_7 minimax_m2 ministral "
    "ministral3 mistral mistral3 mistral_large4 mixtral modernbert modernbert-decoder molmo molmo2 nemo_speechlm nemotron nvfp4 "
    "nystromformer olmo2 olmo3 olmo_hybrid opencua openvla paddleocr_vl pegasus_x persimmon phi3 phi3_v phimoe pix2struct pixtral "
    "pocket_tts smolvlm stablelm step3_vl umt5 vipllava voxtral voxtral_realtime xlm-roberta-xl",
    OTHER: "aimv2 albert big_bird biogpt blenderbot blenderbot-small camembert canine clip clipseg clvp cpmant ctrl data2vec-audio deberta "
    "deberta-v2 dia dpr esm esmc esmfold2 flaubert fnet fsmt funnel gpt_neox_japanese groupvit gte hubert jina_embeddings_v3 "
    "lasr_ctc lasr_encoder layoutlmv2 layoutlmv3 layoutxlm luke markuplm mbart metaclip_2 mgp-str mpnet mt5 musicgen "
    "musicgen_melody nllb-moe omdet-turbo oneformer openai-gpt owlv2 owlvit pegasus perceiver plbart pp_formulanet prophetnet rag "
    "reformer rembert roc_bert roformer sam3 sam3_video seamless_m4t seamless_m4t_v2 siglip2 splinter switch_transformers t5 tapas "
    "trocr udop unispeech unispeech-sat videoprism vits wav2vec2 wav2vec2-bert wav2vec2-conformer whisper xclip xglm xlm "
    "xlm-roberta xlnet xmod yoso",
}
REGISTERED = {model_type: name for name, types in _FAMILIES.items() for model_type in types.split()}
"""`model_type` -> the class that transformers has registered for it. Types that are not among them (Llamas)
have none, or share the configuration of one that has none: what their files say counts."""

REBUILT = frozenset(
    (
        "BertTokenizer",
        "CodeGenTokenizer",
        "CodeLlamaTokenizer",
        "CohereTokenizer",
        "GPT2Tokenizer",
        "GPTNeoXTokenizer",
        "GemmaTokenizer",
        "LlamaTokenizer",
        "Qwen2Tokenizer",
        "Qwen3_5Tokenizer",
        "RobertaTokenizer",
    )
)
"""Classes that make the tokenizer anew: rebuild.py has a recipe for each."""

_MISTAKEN = (
    "arctic camembertv2-base chatlm cohere_asr ernie4_5 ernie4_5_moe fuyu h2ovl_chat hyperclovax hyperclovax_vision_v2 hyperclovax_vlm "
    "internlm2 internlm3 iquestcoder jamba llava llava_next minicpm3 minicpmv minimax_m2 modernbert modernbert-decoder molmo molmo2 nemotron "
    "nvfp4 opencua openvla paddleocr_vl phi3 phi3_v phimoe qwen2 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen4_exp siglip2 smolvlm step3_vl "
    "vipllava"
)
MISTAKEN = frozenset(_MISTAKEN.split())
"""Model types whose folders often name a wrong class: the registered one counts, whatever they say."""

_FOREIGN = (
    "Albert Barthez Bartpho Basic BertGeneration BertJapanese Bertweet BigBird BioGpt BlenderbotSmall Blenderbot ByT5 CLIP CTRL Camembert "
    "Canine Character Clvp ConvBert CpmAnt Cpm DPRContextEncoder DPRQuestionEncoder DPRReader Deberta DebertaV2 Dia DistilBert Esm Esmc "
    "FNet FSMT FastSpeech2Conformer Flaubert Funnel GPTNeoXJapanese GPTSw3 Herbert Lasr LayoutLMv2 LayoutLMv3 LayoutXLM Luke M2M100 "
    "MBart50 MBart MLuke MPNet Marian MarkupLM Mecab Mgpstr MyT5 Nllb Nougat OpenAIGPT PLBart Pegasus Perceiver Phobert Pop2Piano "
    "ProphetNet Rag Reformer RemBert RoCBert RoFormer SeamlessM4T Siglip2 Siglip Speech2Text SpeechT5 Splinter T5 Tapas Tipsv2 Udop "
    "VideoPrism Vits Wav2Vec2CTC Wav2Vec2PhonemeCTC Whisper Wordpiece XGLM XLMRoberta XLM XLNet"
)
FOREIGN = frozenset(name + "Tokenizer" for name in _FOREIGN.split())
"""Classes that do more, or other things, than tokenizer.json says, and are not reproduced here."""

ALIASES = {
    "BartTokenizer": "RobertaTokenizer",
    "LEDTokenizer": "RobertaTokenizer",
    "MvpTokenizer": "RobertaTokenizer",
    "LxmertTokenizer": "BertTokenizer",
    "MobileBertTokenizer": "BertTokenizer",
    "SqueezeBertTokenizer": "BertTokenizer",
}


def class_of(config: Mapping[str, Any], model: Mapping[str, Any], byte_level: Callable[[], bool]) -> str:
    """The class's name without "Fast", of tokenizer_config.json and config.json. `byte_level` says whether tokenizer.json speaks of
    ByteLevel: it is asked only where that matters. Names that transformers does not know are AS_IT_IS."""
    model_type = _text(model, "model_type")
    mistaken = bool({model_type, _text(model, "model_name")} & MISTAKEN)
    declared = (_text(config, "tokenizer_class") or _text(model, "tokenizer_class")).removesuffix("Fast")
    registered = REGISTERED.get(model_type, "")
    if not own_code(config):
        if declared == "LlamaTokenizer" and not mistaken and byte_level():
            return AS_IT_IS
        if declared and registered not in ("", declared):
            return AS_IT_IS if registered == AS_IT_IS else _known(registered if mistaken else declared)
    return _known(declared or registered or AS_IT_IS)


def own_code(config: Mapping[str, Any]) -> bool:
    """Does the folder name Python code of its own as its tokenizer? Nobody runs that without being told to."""
    found = config.get("auto_map")
    return isinstance(found, list) or (isinstance(found, dict) and found.get("AutoTokenizer") is not None)


def _text(source: Mapping[str, Any], name: str) -> str:
    value = source.get(name)
    return value if isinstance(value, str) else ""


def _known(name: str) -> str:
    name = ALIASES.get(name, name)
    return name if name in FOREIGN or name in REBUILT or name == OTHER else AS_IT_IS

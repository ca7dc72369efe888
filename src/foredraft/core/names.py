"""Argument names of vLLM, Transformers and the OpenAI API. NAMES defines how each of them is treated.

A name is accepted if it has a counterpart here, or if its value requests the behaviour of this library anyway. It is ignored if
it only tunes speed or memory. Otherwise it is refused, and the message tells what the name does elsewhere and what to use here.
`foredraft.core.arguments` applies the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from foredraft.core.treatment import CHAT, DRAFT, LOAD, RUN, SAMPLE, Fits, Name, remote_code

_REQUEST, _CALL = (SAMPLE, RUN, CHAT), (RUN, CHAT)
_VLLM, _HF, _BOTH, _OPENAI = "vLLM", "Transformers", "vLLM and Transformers", "the OpenAI API"


def _only(*values: Any) -> Fits:
    plain = (bool, int, float, str, list, tuple, dict)
    return lambda value, _: type(value) in plain and value in values


def _is_bool(value: Any, _: Mapping[Any, Any]) -> bool:
    return isinstance(value, bool)


def _runs_nothing(value: Any, given: Mapping[Any, Any]) -> bool:
    return value is False or remote_code(given.get("model")) == []


def _samples_so(value: Any, given: Mapping[Any, Any]) -> bool:
    temperature = given.get("temperature", 1.0)
    return not isinstance(temperature, int | float) or value is (temperature > 0)  # `SamplingParams` reports a wrong type


def _is_n(value: Any, given: Mapping[Any, Any]) -> bool:
    return value == given.get("n", 1)


def _rows(
    places: tuple[str, ...], library: str, names: str, does: str, use: str | tuple[str, str] = "", fits: Fits | None = None
) -> dict[str, Name]:
    """Returns one row per name, for names with the same meaning. `use` may be a pair: in Python, and on the command line."""
    use, command = (use, "") if isinstance(use, str) else use
    return {name: Name(places, library, does, use or "Leave it out", command, fits) for name in names.split()}


def _in_python(use: str) -> tuple[str, str]:
    """Returns the advice for Python and for the command line, if the command line has no such option."""
    return use, f"Leave it out. In Python, {use[0].lower()}{use[1:]}"


def _means(places: tuple[str, ...], library: str, names: str, ours: str, fits: Fits | None = None) -> dict[str, Name]:
    """Returns rows of names that this library has under another name."""
    option = ours in ("max_tokens", "stop", "dtype", "model")  # options of the command line
    use, command = (f"Use {ours}", f"Use --{ours.replace('_', '-')}") if option else _in_python(f"Use {ours}")
    return {name: Name(places, library, f"is what {ours} is here", use, command, fits, means=ours) for name in names.split()}


def _ignored(places: tuple[str, ...], library: str, names: str) -> dict[str, Name]:
    return {name: Name(places, library, "tunes speed or memory", "Leave it out", ignored=True) for name in names.split()}


_ASSIST = "Use LLM(model, speculative_config={'method': 'lm', 'model': 'DIR'})", "Use --method lm --draft-model DIR"
_BEAMS = "There is no beam search. For several samples give n, with logprobs", "There is no beam search. Leave it out"
_BITS = "Give the checkpoint as it was before quantisation, in bfloat16 or float32"
_CODE = "No code of a checkpoint is run here. Choose a model that Transformers supports by itself"
_CONFIG = "Copy the model's directory and change its config.json"
_CHAT_TOOLS = _in_python("Use tools with LLM.chat")
_DECODE = _in_python("Decode token_ids with get_tokenizer()")
_DEFAULTS = "Give them in SamplingParams", "Give each as an option, for instance --temperature"
_DETOKENIZE = "The text costs little. Leave it out, and read token_ids", "Leave it out, and read token_ids with --json"
_DEVICE = (
    "The model runs on one device, which device='cuda:1' chooses. Leave it out",
    "The model runs on one device, which --device cuda:1 chooses. Leave it out",
)
_DO_SAMPLE = "Use temperature: 0 is greedy, above 0 samples", "Use --temperature: 0 is greedy, above 0 samples"
_ENDS = "Use stop or stop_token_ids, or leave the loop over LLM.stream(prompt)", "Use --stop"
_EOS = _in_python("Use stop_token_ids, with ignore_eos=True where the model's own must not end it")
_FREE = "No output is constrained here. Check the text", "No output is constrained here. Leave it out, and check the text"
_HEADS = "Use method 'parallel', 'medusa' or 'ctc', with a head trained for it", "Use --method parallel, medusa or ctc"
_HUB = "Set the environment variable HF_HUB_CACHE"
_IDS = "Give lists of token ids as prompts, without padding", "Give the text as PROMPT"
_LENGTH = "Use max_tokens, which counts the output alone", "Use --max-tokens, which counts the output alone"
_LOGIN = "Run `hf auth login`, or set the environment variable HF_TOKEN"
_LOGITS = "For log-probabilities use SamplingParams(logprobs=5)", "Leave it out. In Python, logprobs=5 gives log-probabilities"
_LOOKUP = (
    "Use LLM(model, speculative_config={'method': 'ngram', 'num_speculative_tokens': 10})",
    "Use --method ngram --budget 10",
)
_LORA = "Merge the adapter into the model (merge_and_unload of peft), and give the merged directory"
_LOSSY = "For a lossy rule use 'rule': 'typical', or 'tolerance' with 'epsilon'", "For a lossy rule use --rule typical"
_MEASURED = (
    "Leave 'tree' and 'num_speculative_tokens' out of speculative_config, and measurements choose them",
    "Leave --tree and --budget out, and measurements choose them",
)
_NODES = "Use speculative_config={'num_speculative_tokens': 5}", "Use --budget 5"
_PARAMS = "Give sampling_params=SamplingParams(...) with the same fields", "Give each as an option, for instance --temperature"
_PATHS = (
    "Use 'tree': 'static' with 'paths': [[0], [0, 0], [1]], the rank of each child",
    "Use --tree static --speculative-config '{\"paths\": [[0], [0, 0], [1]]}'",
)
_PENALTY = _in_python("Use repetition_penalty or frequency_penalty")
_PICK = _in_python("Use logprobs=-1 or prompt_logprobs=-1, and pick from them")
_REPETITION = _in_python("Use repetition_penalty")
_RULE = "Use 'rule': 'block', or another rule that `foredraft methods` lists", "Use --rule block, or another one"
_SAFE = "Only safetensors are read here. Convert the weights with save_pretrained of Transformers"
_SHORTEN = "Cut the token ids yourself, and give them as the prompt", "Shorten the prompt"
_STORED = "Download that revision with `hf download --local-dir DIR`, and give DIR"
_STREAM = "Use LLM.stream(prompt)", "Leave it out, the text is printed as it comes"
_TEMPLATE = "Use chat_template_kwargs={'enable_thinking': False}, which takes any name", "Use --chat-template-kwargs JSON"
_TEXT = "Models read and write text only here. Leave it out"
_TOKENIZER = "Give tokenizer='DIR', or a loaded tokenizer", "Use --tokenizer DIR"
_TOKENS = _in_python("Use logit_bias={token_id: -math.inf}, bad_words or allowed_token_ids")
_TREES = "Use 'tree': 'topk' for the likeliest drafts, 'chain' or 'dyspec' for sampled ones", "Use --tree topk or --tree dyspec"
_VOCABULARY = "Use a draft model with the target's tokenizer"
_WARP = "Use temperature, top_k, top_p or min_p", "Use --temperature, --top-k, --top-p or --min-p"

_load, _load_hf = partial(_rows, (LOAD,), _VLLM), partial(_rows, (LOAD,), _HF)
_sample, _sample_hf = partial(_rows, _REQUEST, _VLLM), partial(_rows, _REQUEST, _HF)
_call, _call_hf = partial(_rows, _CALL, _VLLM), partial(_rows, _CALL, _HF)
_draft, _assist = partial(_rows, (DRAFT,), _VLLM), partial(_rows, (LOAD, *_REQUEST), _HF)

NAMES: dict[str, Name] = {
    # how a model is loaded
    **_rows((LOAD, DRAFT), _VLLM, "tensor_parallel_size", "spreads a model over devices", _DEVICE, _only(1)),
    **_load("pipeline_parallel_size", "spreads a model's layers over devices", _DEVICE, _only(1)),
    **_load("data_parallel_size", "runs a model several times", _DEVICE, _only(1)),
    **_rows((LOAD, DRAFT), _VLLM, "quantization", "loads weights that are stored in 4 or 8 bits", _BITS),
    **_load_hf("load_in_8bit load_in_4bit quantization_config", "stores weights in 4 or 8 bits", _BITS, _only(False)),
    **_rows((LOAD, DRAFT), _VLLM, "kv_cache_dtype", "stores keys and values in 8 bits", "", _only("auto")),
    **_rows((LOAD,), _BOTH, "trust_remote_code", "runs {code}", _CODE, _runs_nothing),
    **_load("hf_overrides rope_scaling rope_theta", "changes config.json", _CONFIG, _only({})),
    **_rows((LOAD, DRAFT), _VLLM, "tokenizer_revision code_revision", "names a revision on the Hub", _STORED),
    **_load("tokenizer_mode", "chooses how the tokenizer is run", _TOKENIZER, _only("auto", "hf")),
    **_load("reasoning_parser", "parses the thinking of a model", "Parse the text yourself. Leave it out"),
    **_load("kv_transfer_config", "moves keys and values between machines", _DEVICE),
    **_load("enable_expert_parallel", "spreads experts over devices", _DEVICE, _only(False)),
    **_load("pooler_config", "sets up an embedding model", "It generates text. Leave it out"),
    **_load("max_loras max_lora_rank", "sets up adapters", _LORA),
    **_load("logprobs_mode", "chooses which log-probabilities are returned", "", _only("raw_logprobs")),
    **_load_hf("max_memory", "spreads the layers over devices", _DEVICE),
    **_load_hf("subfolder variant gguf_file", "chooses a file of a checkpoint", "Give the directory of the checkpoint itself"),
    **_load_hf("local_files_only", "does not contact the Hub", "Set HF_HUB_OFFLINE to 1 in the environment", _only(False)),
    **_load("skip_tokenizer_init", "loads no tokenizer", _IDS, _only(False)),
    **_load("load_format", "chooses the format of the weights", _SAFE, _only("auto", "safetensors", "hf")),
    **_load_hf("use_safetensors", "chooses the format of the weights", _SAFE, _only(True)),
    **_rows((LOAD,), _BOTH, "download_dir cache_dir", "says where models of the Hub are stored", _HUB),
    **_rows((LOAD,), _BOTH, "hf_token token", "logs in to the Hub", _LOGIN, _only(False)),
    **_load("task runner convert", "chooses what a model does", "It generates text. Leave it out", _only("auto", "generate")),
    **_load("model_impl config_format", "chooses how a model is read", "", _only("auto", "hf", "transformers")),
    **_load("enable_lora enable_prompt_adapter", "loads adapters", _LORA, _only(False)),
    **_load("limit_mm_per_prompt allowed_local_media_path", "is for images and sound", _TEXT, _only({}, "")),
    **_load("guided_decoding_backend structured_outputs_config", "constrains the output", _FREE, _only("auto", {})),
    **_load("override_generation_config", "sets defaults of the sampling", _DEFAULTS, _only({})),
    **_means((LOAD,), _HF, "torch_dtype", "dtype"),
    **_means((LOAD,), _HF, "pretrained_model_name_or_path", "model"),
    **_load_hf("device_map", "spreads the layers over devices", _DEVICE, _only("auto")),
    **_ignored((LOAD, DRAFT), _VLLM, "enforce_eager attention_backend moe_backend"),
    **_ignored((LOAD,), _VLLM, "gpu_memory_utilization swap_space cpu_offload_gb num_gpu_blocks_override"),
    **_ignored((LOAD,), _VLLM, "block_size enable_chunked_prefill max_seq_len_to_capture"),
    **_ignored((LOAD,), _VLLM, "compilation_config disable_custom_all_reduce"),
    **_ignored((LOAD,), _VLLM, "num_scheduler_steps max_parallel_loading_workers async_scheduling"),
    **_ignored((LOAD,), _VLLM, "distributed_executor_backend scheduling_policy preemption_mode"),
    **_ignored((LOAD,), _VLLM, "disable_log_stats served_model_name max_logprobs low_cpu_mem_usage attn_implementation"),
    # how a request is sampled
    **_means(_REQUEST, _HF, "max_new_tokens", "max_tokens"),
    **_means(_REQUEST, _OPENAI, "max_completion_tokens", "max_tokens"),
    **_means(_REQUEST, _HF, "min_new_tokens", "min_tokens"),
    **_means(_REQUEST, _HF, "num_return_sequences", "n"),
    **_means(_REQUEST, _HF, "stop_strings", "stop"),
    **_means(_REQUEST, _OPENAI, "top_logprobs", "logprobs"),
    **_sample("structured_outputs guided_decoding guided_options_request", "constrains the output", _FREE),
    **_sample("guided_json guided_regex guided_choice guided_grammar", "constrains the output", _FREE),
    **_rows(_REQUEST, _OPENAI, "response_format", "constrains the output to JSON", _FREE, _only({"type": "text"})),
    **_sample_hf("do_sample", "chooses between greedy decoding and sampling", _DO_SAMPLE, _samples_so),
    **_sample_hf("num_beams num_beam_groups", "is the width of a beam search", _BEAMS, _only(1)),
    **_rows(_REQUEST, _BOTH, "use_beam_search early_stopping", "sets up a beam search", _BEAMS, _only(False)),
    **_rows(_REQUEST, _BOTH, "length_penalty", "ranks the beams of a search", _BEAMS, _only(0, 1)),
    **_sample_hf("diversity_penalty constraints force_words_ids", "steers a beam search", _BEAMS, _only(0)),
    **_sample("best_of", "samples so many outputs and returns the n likeliest", _in_python("Give n, with logprobs"), _is_n),
    **_sample_hf("max_length", "limits prompt and output together", _LENGTH),
    **_sample_hf("min_length", "is the least length of prompt and output", _in_python("Use min_tokens"), _only(0)),
    **_sample_hf("max_time", "ends the output after so many seconds", _LENGTH),
    **_sample_hf("eos_token_id", "names the tokens that end the output", _EOS),
    **_sample_hf("stopping_criteria", "ends the output by code", _ENDS, _only([])),
    **_sample_hf("bos_token_id decoder_start_token_id", "is the token before a text", "The tokenizer adds it. Leave it out"),
    **_sample_hf("forced_bos_token_id forced_eos_token_id", "forces a token", _FREE),
    **_sample_hf("bad_words_ids suppress_tokens begin_suppress_tokens sequence_bias", "bans tokens", _TOKENS, _only([], {})),
    **_sample_hf("typical_p top_h", "cuts unlikely tokens", _WARP, _only(1)),
    **_sample_hf("epsilon_cutoff eta_cutoff", "cuts unlikely tokens", _WARP, _only(0)),
    **_sample_hf("no_repeat_ngram_size encoder_no_repeat_ngram_size", "bans repeated n-grams", _PENALTY, _only(0)),
    **_sample_hf("encoder_repetition_penalty", "favours tokens of the prompt", _in_python("Use logit_bias"), _only(1)),
    **_sample_hf("guidance_scale", "changes how likely tokens are", _WARP, _only(1)),
    **_sample_hf("penalty_alpha dola_layers", "changes how likely tokens are", _WARP, _only(0)),
    **_sample_hf("exponential_decay_length_penalty", "ends the output sooner", _LENGTH),
    **_sample_hf("renormalize_logits remove_invalid_values", "changes invalid logits", "", _is_bool),
    **_sample_hf("token_healing", "changes the end of the prompt", "", _only(False)),
    **_sample_hf("prefix_allowed_tokens_fn", "constrains the output by code", _TOKENS),
    **_sample_hf("past_key_values", "continues a cache", _IDS),
    **_sample_hf("return_full_text", "repeats the prompt in the text", "", _only(False)),
    **_rows(_REQUEST, "llama.cpp", "repeat_penalty", "is what repetition_penalty is here", _REPETITION),
    **_rows(_REQUEST, _OPENAI, "functions function_call", "describes functions", _CHAT_TOOLS, _only([], {})),
    **_rows(_REQUEST, _OPENAI, "stream_options", "adds the usage to a stream", "Read metrics of the output. Leave it out"),
    **_ignored(_REQUEST, _HF, "synced_gpus"),
    **_ignored(_REQUEST, _OPENAI, "metadata service_tier"),
    **_sample_hf("watermarking_config", "marks the text as generated"),
    **_sample("thinking_token_budget repetition_detection", "ends the output, or its thinking", _LENGTH),
    **_rows(_REQUEST, _BOTH, "logits_processors logits_processor", "changes logits by code", _TOKENS, _only([])),
    **_sample("detokenize", "leaves the text out", _DETOKENIZE, _only(True)),
    **_sample("spaces_between_special_tokens", "spaces special tokens", _DECODE, _only(True)),
    **_sample("extra_args vllm_xargs", "is passed to plug-ins", "", _only({})),
    **_sample("truncate_prompt_tokens", "keeps the last tokens of a prompt", _SHORTEN),
    **_sample("logprob_token_ids prompt_logprob_token_ids flat_logprobs", "chooses log-probabilities", _PICK, _only(False)),
    **_sample_hf("output_scores output_logits return_dict_in_generate", "returns logits", _LOGITS, _only(False)),
    **_rows(_REQUEST, _OPENAI, "stream", "yields the output as it comes", _STREAM, _only(False)),
    **_sample_hf("streamer", "prints the output as it comes", _STREAM),
    **_ignored(_REQUEST, _VLLM, "skip_clone skip_reading_prefix_cache stream_interval"),
    **_ignored(_REQUEST, _HF, "use_cache cache_implementation cache_config prefill_chunk_size disable_compile pad_token_id"),
    # what is generated from
    **_means(_CALL, _VLLM, "use_tqdm", "progress", _is_bool),
    **_call("lora_request prompt_adapter_request", "adds an adapter to the model", _LORA),
    **_rows(_CALL, _BOTH, "multi_modal_data images videos audios", "gives images or sound to the model", _TEXT),
    **_rows((LOAD, *_CALL), _VLLM, "mm_processor_kwargs", "is for images and sound", _TEXT, _only({})),
    **_call("prompt_token_ids", "gives token ids", _IDS),
    **_call_hf("input_ids inputs attention_mask", "gives token ids in a tensor", _IDS),
    **_call_hf("generation_config", "gives the sampling", _PARAMS),
    **_rows((CHAT,), _BOTH, "enable_thinking reasoning_effort documents", "is passed to the chat template", _TEMPLATE),
    **_rows(_CALL, _OPENAI, "tool_choice parallel_tool_calls", "forces or forbids calls", "Leave it out", _only("auto", True)),
    **_ignored(_CALL, _VLLM, "priority"),
    # how tokens are drafted
    **_load("speculative_model", "names the draft model", _ASSIST),
    **_load("ngram_prompt_lookup_max ngram_prompt_lookup_min", "sets up prompt lookup", _LOOKUP),
    **_assist("assistant_model", "drafts with a second model", _ASSIST),
    **_assist("assistant_tokenizer", "is the draft model's", "It is read beside the draft model. Leave it out"),
    **_assist("prompt_lookup_num_tokens max_matching_ngram_size", "drafts by prompt lookup", _LOOKUP),
    **_assist("num_assistant_tokens", "is the number of drafted tokens", _NODES),
    **_assist("num_assistant_tokens_schedule assistant_confidence_threshold", "tunes how much is drafted", _MEASURED),
    **_assist("assistant_early_exit assistant_lookbehind target_lookbehind", "tunes drafting", _MEASURED),
    **_draft("draft_tensor_parallel_size", "spreads the draft model over devices", _DEVICE, _only(1)),
    **_draft("speculative_token_tree", "is the shape of the tree", _PATHS),
    **_draft("rejection_sample_method", "chooses the acceptance rule", _RULE, _only("standard", "strict", "probabilistic")),
    **_draft("draft_sample_method", "chooses between the likeliest drafts and sampled ones", _TREES),
    **_draft("acceptance_method", "chooses the acceptance rule", _LOSSY, _only("rejection_sampler")),
    **_draft("synthetic_acceptance_rates synthetic_acceptance_length", "accepts drafts at a fixed rate", _LOSSY),
    **_draft("posterior_threshold posterior_alpha", "accepts likely drafts", _LOSSY),
    **_draft("parallel_drafting", "drafts all tokens at once", _HEADS, _only(False)),
    **_draft("use_heterogeneous_vocab", "drafts with another vocabulary", _VOCABULARY, _only(False)),
    **_draft("revision", "is the draft model's revision on the Hub", _STORED),
    **_ignored((DRAFT,), _VLLM, "max_model_len"),
    **_ignored((DRAFT,), _VLLM, "suffix_decoding_max_cached_requests disable_padded_drafter_batch disable_eagle_block_drop"),
    **_ignored((DRAFT,), _VLLM, "use_local_argmax_reduction disable_by_batch_size disable_logprobs"),
    **_ignored((DRAFT,), _VLLM, "num_speculative_tokens_per_batch_size enable_adaptive_verification draft_load_config"),
}

METHODS_ELSEWHERE = {
    **dict.fromkeys(("mtp", "deepseek_mtp"), "drafts by layers of the model itself, which are not run here"),
    "mlp_speculator": "drafts by a head of IBM's accelerator, which is not read here",
    "custom_class": "drafts by code of the user. Add a row to DRAFTERS instead",
}
"""Methods of vLLM that this library does not have -> what they do."""

METHODS = {"draft_model": "lm", "ngram_gpu": "ngram", "prompt_lookup": "ngram", "suffix_decoding": "suffix"}
"""Names of methods in vLLM -> our names of the same methods."""

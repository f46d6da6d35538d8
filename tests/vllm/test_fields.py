"""A verdict on each field of vLLM's configuration: does it change the bytes of chunks?

The table has the fields of vLLM 0.29 to 0.33. A field that a newer vLLM adds makes the first test
fail until it is judged here. What only changes how numbers are rounded does not count: within one
engine the company of a request in its batch does so too.
"""

from __future__ import annotations

import dataclasses
import typing
from types import SimpleNamespace
from typing import Any

import pytest

from lmkv_ray.config import load_settings
from lmkv_ray.vllm.identity.model_config import OPTIONS, options
from lmkv_ray.vllm.identity.namespace import derive_namespace
from tests.vllm.two_places import GROUP, config

pytestmark = pytest.mark.each_vllm

IN_OTHER_FIELDS = {
    "attention_config.backend": "layout, where backends pack differently",
    "attention_config.backend_per_kind": "layout, where backends pack differently",
    "attention_config.use_fp4_indexer_cache": "layout",
    "cache_config.block_size": "block_tokens",
    "cache_config.cache_dtype": "cache_dtype",
    "cache_config.hash_block_size": "block_tokens",
    "cache_config.kv_cache_layout": "layout",
    "cache_config.prefix_caching_hash_algo": "hash_algorithm",
    "cache_config.skip_page_size_padded": "layout",
    "cache_config.sliding_window": "layout",
    "load_config.download_dir": "weights",
    "load_config.ignore_patterns": "weights",
    "load_config.load_format": "weights",
    "model_config.code_revision": "code",
    "model_config.config_format": "model",
    "model_config.dtype": "dtype",
    "model_config.hf_config": "model",
    "model_config.hf_config_path": "model",
    "model_config.hf_overrides": "model",
    "model_config.hf_text_config": "model",
    "model_config.max_model_len": "length",
    "model_config.model": "weights",
    "model_config.model_weights": "weights",
    "model_config.multimodal_config": "options, processor",
    "model_config.quantization": "quantization",
    "model_config.quantization_config": "quantization",
    "model_config.revision": "weights",
    "model_config.seed": "weights",
    "model_config.trust_remote_code": "code",
    "parallel_config.pipeline_parallel_size": "parallel",
    "parallel_config.tensor_parallel_size": "parallel",
    "quant_config": "quantization",
    "speculative_config.code_revision": "draft",
    "speculative_config.draft_load_config": "draft",
    "speculative_config.draft_model_config": "draft, options",
    "speculative_config.method": "draft",
    "speculative_config.model": "draft",
    "speculative_config.quantization": "options, of the draft",
    "speculative_config.revision": "draft",
}
"""What decides bytes, and the field of the namespace that has it."""

_REFUSED = """
    attention_config.hisparse_config cache_config.enable_mamba_fine_grained_prefix_cache
    cache_config.enable_mamba_shared_prefix_checkpoint cache_config.mamba_block_size
    cache_config.mamba_cache_dtype cache_config.mamba_cache_mode
    cache_config.mamba_page_size_padded cache_config.mamba_ssm_cache_dtype
    cache_config.replayssm_buffer_len cache_config.swa_bounded_replay
    cache_config.use_kda_recoverssm cache_config.use_replayssm
    cache_config.user_specified_mamba_block_size mamba_config.backend
    mamba_config.enable_stochastic_rounding mamba_config.ssu_algorithm
    mamba_config.stochastic_rounding_philox_rounds
    model_config.multimodal_config.mm_encoder_fp8_scale_path
    parallel_config._allow_auto_resolve_cp_interleave_size
    parallel_config.cp_kv_cache_interleave_size parallel_config.dcp_comm_backend
    parallel_config.dcp_kv_cache_interleave_size parallel_config.dcp_q_replicate
    parallel_config.decode_context_parallel_size parallel_config.prefill_context_parallel_size
"""
REFUSED = frozenset(_REFUSED.split())
"""Engines in which these matter are refused: by the kinds of their KV cache, or by name."""

NO_MATTER = {
    "attention_config": (
        "another rounding, or another way to the same numbers",
        """
        flash_attn_max_num_splits_for_cuda_graph flash_attn_version flex_attn_block_m
        flex_attn_block_n flex_attn_kv_block_size flex_attn_q_block_size
        indexer_tp_shard_min_rows minimax_m3_indexer_cp minimax_m3_msa_decode_backend
        mla_prefill_backend sparse_mla_force_mqa sparse_mla_prefill_workspace_factor
        tokenspeed_mla_min_split_kv tq_max_kv_splits_for_cuda_graph trtllm_ragged_backend
        use_trtllm_attention
        """,
    ),
    "aux_output_config": (
        "what is returned beside text",
        """
        enable_return_routed_experts max_bytes
        """,
    ),
    "cache_config": (
        "how much is kept, and where",
        """
        _block_size_resolved cache_hit_alignment_tokens effective_attention_block_size
        enable_prefix_caching gpu_memory_utilization is_attention_free
        kv_cache_max_concurrency kv_cache_memory_bytes kv_cache_size_tokens
        kv_offloading_backend kv_offloading_size kv_sharing_fast_prefill num_cpu_blocks
        num_gpu_blocks num_gpu_blocks_override prefix_cache_retention_interval
        prefix_match_unit simple_cpu_offload_num_blocks
        user_specified_block_size
        """,
    ),
    "compilation_config": (
        "another rounding",
        """
        backend cache_dir compilation_time compile_cache_save_format compile_mm_encoder
        compile_ranges_endpoints compile_sizes cudagraph_capture_sizes cudagraph_copy_inputs
        cudagraph_decoder_replay cudagraph_mm_encoder cudagraph_mode
        cudagraph_num_of_warmups cudagraph_specialize_lora custom_ops debug_dump_path
        decoder_replay_cudagraph_capture_sizes decoder_replay_trim_threshold
        disabled_custom_ops dynamic_shapes_config enabled_custom_ops
        encoder_compilation_time encoder_cudagraph_max_frames_per_batch
        encoder_cudagraph_max_vision_items_per_batch encoder_cudagraph_token_budgets
        fast_moe_cold_start inductor_compile_config inductor_passes ir_enable_torch_wrap
        local_cache_dir max_cudagraph_capture_size mode pass_config splitting_ops
        static_all_moe_layers static_forward_context traced_files
        use_inductor_graph_partition
        """,
    ),
    "device_config": (
        "",
        """
        device
        """,
    ),
    "ec_manager_config": (
        "where outputs of encoders are kept",
        """
        encoder_cache_manager_cls manager_config
        """,
    ),
    "ec_transfer_config": (
        "how outputs of encoders move",
        """
        ec_buffer_device ec_buffer_size ec_connector ec_connector_extra_config
        ec_connector_module_path ec_ip ec_parallel_size ec_port ec_rank ec_role engine_id
        mm_encoder_output_widths
        """,
    ),
    "engram_config": (
        "where tables of embeddings lie",
        """
        cpu_offload dp_shared_memory embedding_across_dp use_thp
        """,
    ),
    "instance_id": ("a name", ""),
    "kernel_config": (
        "another rounding",
        """
        enable_bf16x3_router_gemm enable_cutedsl_warmup enable_flashinfer_autotune
        enable_jit_warmup enable_rocm_segmented_attn_autotune ir_op_priority monokernel
        sparse_indexer_topk_backend
        """,
    ),
    "kv_events_config": (
        "who is told",
        """
        buffer_steps enable_kv_cache_events endpoint hwm max_queue_size publisher
        replay_endpoint topic
        """,
    ),
    "kv_transfer_config": (
        "who keeps chunks",
        """
        enable_permute_local_kv engine_id kv_buffer_device kv_buffer_size kv_connector
        kv_connector_extra_config kv_connector_module_path kv_ip kv_load_failure_policy
        kv_parallel_size kv_port kv_rank kv_role
        """,
    ),
    "load_config": (
        "how the same weights are read",
        """
        device model_loader_extra_config pt_load_map_location safetensors_load_strategy
        safetensors_prefetch_block_size safetensors_prefetch_num_threads use_tqdm_on_load
        """,
    ),
    "logging_config": (
        "logs",
        """
        configure_logging formatter log_level pylogging_config_file
        """,
    ),
    "lora_config": (
        "room for adapters; which one is used is in each key, by content",
        """
        default_mm_loras enable_mixed_moe_lora_format enable_moe_shared_loras
        fully_sharded_loras max_cpu_loras max_lora_cls_labels max_lora_rank max_loras
        specialize_active_lora
        """,
    ),
    "model_config": (
        "not part of what layers compute",
        """
        allow_deprecated_quantization allowed_local_media_path allowed_media_domains
        disable_cascade_attn enable_cumem_allocator enable_nccl_comm_suspend
        enable_prompt_embeds enable_return_routed_experts enable_sleep_mode
        enable_trace_replay enforce_eager generation_config hf_token io_processor_plugin
        is_submodel_config logits_processors logprobs_mode max_logprobs
        override_generation_config pooler_config renderer_num_workers return_sampling_mask
        served_model_name skip_tokenizer_init sleep_mode_backend
        sleep_mode_offload_cudagraph sleep_preserve_parameter_names
        spec_target_max_model_len tokenizer tokenizer_mode tokenizer_revision
        use_fp64_gumbel word_embeddings_untied_by_checkpoint
        """,
    ),
    "model_config.multimodal_config": (
        "another rounding, or where and how much is kept",
        """
        enable_mm_embeds interleave_mm_strings language_model_only limit_per_prompt
        mm_encoder_attn_backend mm_encoder_fp8_scale_save_margin
        mm_encoder_fp8_scale_save_path mm_encoder_only mm_encoder_tp_mode
        mm_hasher_algorithm mm_ipc_gpu_memory_gb mm_processor_cache_gb
        mm_processor_cache_type mm_shm_cache_max_object_size_mb mm_tensor_ipc
        skip_mm_profiling
        """,
    ),
    "observability_config": (
        "metrics",
        """
        collect_detailed_traces cudagraph_metrics custom_histogram_buckets
        enable_layerwise_nvtx_tracing enable_logging_iteration_details enable_mfu_metrics
        enable_mm_processor_stats jit_monitor_mode jit_monitor_verbose kv_cache_metrics
        kv_cache_metrics_sample otlp_traces_endpoint per_request_spec_decode_metrics
        show_hidden_metrics_for_version
        """,
    ),
    "offload_config": (
        "where weights lie",
        """
        offload_backend prefetch uva
        """,
    ),
    "optimization_level": ("another rounding", ""),
    "parallel_config": (
        "where the same numbers are computed",
        """
        _api_process_count _api_process_rank _coord_store_port
        _data_parallel_master_port_list assigned_physical_gpu_ids
        cpu_distributed_timeout_seconds data_parallel_backend data_parallel_external_lb
        data_parallel_hybrid_lb data_parallel_index data_parallel_master_ip
        data_parallel_master_port data_parallel_rank data_parallel_rank_local
        data_parallel_rpc_port data_parallel_size data_parallel_size_local
        dbo_decode_token_threshold dbo_prefill_token_threshold disable_custom_all_reduce
        disable_nccl_for_dp_synchronization distributed_executor_backend
        distributed_timeout_seconds dp_sync_interval elastic_ep_max_dp_size
        enable_batch_sharded_sampling enable_dbo enable_elastic_ep enable_ep_weight_filter
        enable_eplb enable_expert_parallel enable_fault_tolerance enable_hc_sp
        enable_shm_tensor_arena eplb_config expert_placement_strategy fault_tolerance_config
        is_moe_model master_addr master_port max_parallel_loading_workers nnodes node_rank
        numa_bind numa_bind_cpus numa_bind_nodes placement_group rank ray_runtime_env
        ray_workers_use_nsight sd_worker_cls ubatch_size worker_extension_cls world_size
        """,
    ),
    "performance_mode": ("another rounding", ""),
    "profiler_config": (
        "profiles",
        """
        active_iterations capture_torch_profiler delay_iterations detailed_trace_annotation
        ignore_frontend max_iterations profiler proton_backend proton_context proton_data
        proton_graph_attribution proton_hook proton_mode proton_output_format
        proton_profiler_dir torch_profiler_activities torch_profiler_dir
        torch_profiler_dump_cuda_time_total torch_profiler_record_shapes
        torch_profiler_use_gzip torch_profiler_with_flops torch_profiler_with_memory
        torch_profiler_with_stack wait_iterations warmup_iterations
        """,
    ),
    "reasoning_config": (
        "what is done with text",
        """
        _enabled _natural_reasoning_end_token_ids _reasoning_end_token_ids
        _reasoning_start_token_ids reasoning_end_str reasoning_parser reasoning_start_str
        """,
    ),
    "scheduler_config": (
        "what is computed when",
        """
        async_scheduling disable_chunked_mm_input disable_hybrid_kv_cache_manager
        enable_chunked_prefill encoder_cache_size is_multimodal_model
        long_prefill_token_threshold long_prefill_token_threshold_adaptive
        max_num_active_seqs max_num_batched_tokens max_num_encoder_input_tokens
        max_num_queued_reqs max_num_queued_tokens max_num_scheduled_tokens max_num_seqs
        policy prefill_schedule_interval runner_type scheduler_cls
        scheduler_reserve_full_isl stream_interval watermark
        """,
    ),
    "shutdown_timeout": ("ends", ""),
    "speculative_config": (
        "which drafts are tried; what is accepted is the model's own",
        """
        attention_backend disable_eagle_block_drop disable_lookahead_block_hashes
        disable_padded_drafter_batch draft_lm_head_quantization draft_parallel_config
        draft_sample_method draft_tensor_parallel_size dspark_draft_topk
        enable_adaptive_verification enforce_eager fly_entropy_threshold fly_entropy_top_k
        fly_window_size max_model_len
        num_speculative_tokens
        num_speculative_tokens_per_batch_size prompt_lookup_max prompt_lookup_min
        rejection_sample_method suffix_decoding_max_cached_requests
        suffix_decoding_max_spec_factor suffix_decoding_max_tree_depth
        suffix_decoding_min_token_prob synthetic_acceptance_length
        synthetic_acceptance_rates target_model_config target_parallel_config
        tensor_parallel_size use_local_argmax_reduction xpress_topc
        """,
    ),
    "structured_outputs_config": (
        "which tokens are sampled",
        """
        backend disable_additional_properties disable_any_whitespace enable_in_reasoning
        reasoning_parser reasoning_parser_plugin
        """,
    ),
    "watchdog_config": (
        "watches",
        """
        check_interval dump_dir timeout
        """,
    ),
    "watermark_config": (
        "which tokens are sampled",
        """
        algorithm allow_target_only_watermarking alpha context_width deduplicate_contexts
        deduplicate_contexts_max_history key prf
        """,
    ),
    "weight_transfer_config": (
        "new weights begin a generation",
        """
        backend
        """,
    ),
}
"""Settings that change no bytes of a chunk but by rounding: why, and which."""

NESTED = ("model_config.multimodal_config",)
"""Parts of parts that have a table of their own."""


def no_matter() -> list[str]:
    return [
        f"{section}.{name}" if names else section
        for section, (_, names) in NO_MATTER.items()
        for name in names.split() or [section]
    ]


def fields_of(kind: type, prefix: str = "") -> set[str]:
    """The fields of vLLM's configuration, to the depth of the table."""
    found = set()
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        path = prefix + field.name
        parts = {hints[field.name], *typing.get_args(hints[field.name])}
        inner = [
            part for part in parts if dataclasses.is_dataclass(part) and isinstance(part, type)
        ]
        if path in NESTED:
            found.add(path)
        if inner and (not prefix or path in NESTED):
            for part in inner:
                found |= fields_of(part, f"{path}.")
        else:
            found.add(path)
    return found


def test_every_field_of_this_vllm_has_one_verdict() -> None:
    from vllm.config import VllmConfig

    judged = [*OPTIONS, *IN_OTHER_FIELDS, *REFUSED, *no_matter()]
    assert len(judged) == len(set(judged)), sorted(n for n in judged if judged.count(n) > 1)
    assert fields_of(VllmConfig) <= set(judged), "judge these: do they change the bytes of chunks?"


def put(made: Any, path: str, value: object) -> Any:
    """Set a field, and make the parts on the way to it."""
    *parts, name = path.split(".")
    target = made
    for part in parts:
        if not isinstance(getattr(target, part, None), SimpleNamespace):
            setattr(target, part, SimpleNamespace())
        target = getattr(target, part)
    setattr(target, name, value)
    return made


@pytest.mark.parametrize("path", OPTIONS)
def test_what_changes_bytes_is_in_the_namespace(path: str) -> None:
    told = [options(put(config(0), path, value)) for value in ("one", "another")]
    assert told[0] != told[1]


def test_what_changes_no_bytes_is_not() -> None:
    def namespace(made: Any) -> bytes:
        return derive_namespace(made, load_settings(), [GROUP], []).digest()

    plain = namespace(config(0))
    harmful = [part for part in no_matter() if namespace(put(config(0), part, "other")) != plain]
    assert not harmful

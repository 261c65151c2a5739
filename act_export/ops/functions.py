"""The operators as model-local ONNX functions in standard operators, for runtimes without the native library.

A model carries the function of each operator that it uses. It computes the definition in
`act_export.calibration.reference` step by step, in float32 whatever the storage type, with full attention maps: correct
everywhere, fast nowhere.
"""

from __future__ import annotations

import onnx
import onnx.parser

from act_export.ops import schema

OPSET = 23
_FAR = 2**31 - 1

# Names of the values follow the definition: A, C, a (scores), K (sinks), s, n. A learned sink takes its share of the
# softmax afterwards: what the keys keep of it is a sigmoid of what their log-sum-exp has over the sink's logit.
_ATTENTION_MAP = f"""
  i0 = Constant <value_ints: ints = [0]> ()
  i1 = Constant <value_ints: ints = [1]> ()
  i2 = Constant <value_ints: ints = [2]> ()
  i3 = Constant <value_ints: ints = [3]> ()
  last = Constant <value_ints: ints = [-1]> ()
  far = Constant <value_ints: ints = [{_FAR}]> ()
  zero = Constant <value_int: int = 0> ()
  one = Constant <value_int: int = 1> ()
  f0 = Constant <value_float: float = 0.0> ()
  f1 = Constant <value_float: float = 1.0> ()
  heads_all = Constant <value_int: int = @num_heads> ()
  heads_kv = Constant <value_int: int = @kv_num_heads> ()
  heads_all_1 = Unsqueeze (heads_all, i0)
  heads_kv_1 = Unsqueeze (heads_kv, i0)
  sequence = Shape <start: int = 1, end: int = 2> (query)
  total = Shape <start: int = 1, end: int = 2> (attention_mask)
  past = Sub (total, sequence)

  split_kv = Concat <axis: int = 0> (i0, i0, heads_kv_1, last)
  key_split = Reshape (key, split_kv)
  value_split = Reshape (value, split_kv)
  key_new = Transpose <perm: ints = [0, 2, 1, 3]> (key_split)
  value_new = Transpose <perm: ints = [0, 2, 1, 3]> (value_split)
  past_key_used = Slice (past_key, i0, past, i2)
  past_value_used = Slice (past_value, i0, past, i2)
  past_key_rest = Slice (past_key, total, far, i2)
  past_value_rest = Slice (past_value, total, far, i2)
  present_key = Concat <axis: int = 2> (past_key_used, key_new, past_key_rest)
  present_value = Concat <axis: int = 2> (past_value_used, value_new, past_value_rest)
  keys_any = Slice (present_key, i0, total, i2)
  values_any = Slice (present_value, i0, total, i2)
  keys = Cast <to: int = 1> (keys_any)
  values = Cast <to: int = 1> (values_any)

  real = Cast <to: int = 9> (attention_mask)
  real_4d_axes = Constant <value_ints: ints = [1, 2]> ()
  real_4d = Unsqueeze (real, real_4d_axes)
  total_0 = Squeeze (total, i0)
  past_0 = Squeeze (past, i0)
  columns = Range (zero, total_0, one)
  rows_flat = Range (past_0, total_0, one)
  rows = Unsqueeze (rows_flat, i1)
  window_given = Constant <value_int: int = @sliding_window> ()
  no_window = Less (window_given, zero)
  window = Where (no_window, total_0, window_given)
  causal = LessOrEqual (columns, rows)
  first_in_window = Sub (rows, window)
  in_window = Greater (columns, first_in_window)
  visible_2d = And (causal, in_window)
  visible = And (visible_2d, real_4d)

  query_f = Cast <to: int = 1> (query)
  group = Div (heads_all_1, heads_kv_1)
  split_groups = Concat <axis: int = 0> (i0, i0, heads_kv_1, group, last)
  query_split = Reshape (query_f, split_groups)
  query_heads = Transpose <perm: ints = [0, 2, 3, 1, 4]> (query_split)
  keys_t = Transpose <perm: ints = [0, 1, 3, 2]> (keys)
  keys_g = Unsqueeze (keys_t, i2)
  products_g = MatMul (query_heads, keys_g)
  map_shape = Concat <axis: int = 0> (i0, heads_all_1, sequence, total)
  products = Reshape (products_g, map_shape)
  scale = Constant <value_float: float = @scale> ()
  scaled = Mul (products, scale)
  softcap = Constant <value_float: float = @softcap> ()
  has_softcap = Greater (softcap, f0)
  logits = If (has_softcap) <
    then_branch = capped_graph () => (float[b, h, s, t] capped) {{
      ratio = Div (scaled, softcap)
      squashed = Tanh (ratio)
      capped = Mul (squashed, softcap)
    }},
    else_branch = plain_graph () => (float[b, h, s, t] uncapped) {{ uncapped = Identity (scaled) }}
  >
@@initial@@
  lowest = Constant <value_float: float = -3.4e38> ()
  masked = Where (visible, logits_given, lowest)
  soft = Softmax <axis: int = -1> (masked)
  sinks_flat = Constant <value_floats: floats = @sink_logits> ()
  sinks_axes = Constant <value_ints: ints = [1, 2]> ()
  sinks = Unsqueeze (sinks_flat, sinks_axes)
  largest_sink = ReduceMax <keepdims: int = 0> (sinks_flat)
  no_sink = Constant <value_float: float = @@no_sink@@> ()
  has_sinks = Greater (largest_sink, no_sink)
  shared = If (has_sinks) <
    then_branch = sinks_graph () => (float[b, h, s, t] lessened) {{
@@log_sum_exp@@
      lead = Sub (log_sum, sinks)
      share = Sigmoid (lead)
      lessened = Mul (soft, share)
    }},
    else_branch = no_sinks_graph () => (float[b, h, s, t] whole) {{ whole = Identity (soft) }}
  >
  A_all = Where (visible, shared, f0)

  groups_shape = Concat <axis: int = 0> (i0, heads_kv_1, group, sequence, total)
  A_groups = Reshape (A_all, groups_shape)
  values_g = Unsqueeze (values, i2)
  mixed_g = MatMul (A_groups, values_g)
  mixed_shape = Concat <axis: int = 0> (i0, heads_all_1, sequence, last)
  mixed = Reshape (mixed_g, mixed_shape)
"""

# log(gamma) in the logits of the initial token. Values out of range are taken for the nearest in it.
_INITIAL = """
  two = Constant <value_int: int = 2> ()
  f2 = Constant <value_float: float = 2.0> ()
  heads = Constant <value_ints: ints = @calibrated_heads> ()
  head_indices = Unsqueeze (heads, i1)
  betas_given = Gather <axis: int = 2> (calibration, zero)
  betas = Clip (betas_given, f0, f2)
  gammas_given = Gather <axis: int = 2> (calibration, one)
  lowest_gamma = Constant <value_float: float = 0.0625> ()
  highest_gamma = Constant <value_float: float = 16.0> ()
  gammas = Clip (gammas_given, lowest_gamma, highest_gamma)
  thresholds_given = Gather <axis: int = 2> (calibration, two)
  thresholds = Max (thresholds_given, f0)
  log_gammas = Log (gammas)
  log_gammas_t = Transpose <perm: ints = [1, 0]> (log_gammas)
  calibrations = Shape <start: int = 0, end: int = 1> (calibration)
  all_heads_shape = Concat <axis: int = 0> (heads_all_1, calibrations)
  no_gammas = Expand (f0, all_heads_shape)
  all_gammas_t = ScatterND (no_gammas, head_indices, log_gammas_t)
  all_gammas = Transpose <perm: ints = [1, 0]> (all_gammas_t)
  map_axes = Constant <value_ints: ints = [2, 3]> ()
  all_gammas_4d = Unsqueeze (all_gammas, map_axes)
  real_f = Cast <to: int = 1> (real)
  real_so_far = CumSum (real_f, one)
  is_first = Equal (real_so_far, f1)
  is_initial = And (is_first, real)
  initial_f = Cast <to: int = 1> (is_initial)
  initial_4d = Unsqueeze (initial_f, real_4d_axes)
  on_initial = Mul (all_gammas_4d, initial_4d)
  logits_given = Add (logits, on_initial)
"""

_NO_INITIAL = """
  logits_given = Identity (logits)
"""

_CALIBRATION = """
  A = Gather <axis: int = 1> (A_all, heads)

  real_rows_2d = Slice (real_f, past, total, i1)
  real_rows_axes = Constant <value_ints: ints = [1, 3]> ()
  real_rows = Unsqueeze (real_rows_2d, real_rows_axes)
  A_real = Mul (A, real_rows)
  C_all = ReduceSum <keepdims: int = 0> (A_real, i2)
  is_plain = Equal (betas, f1)
  is_plain_3d = Unsqueeze (is_plain, last)
  C_new = Where (is_plain_3d, f0, C_all)
  C_past_4d = Slice (past_sink_scores, i0, past, i2)
  C_past = Squeeze (C_past_4d, last)
  padding = Concat <axis: int = 0> (i0, i0, i0, i0, i0, sequence)
  C_padded = Pad (C_past, padding)
  C = Add (C_padded, C_new)
  C_4d = Unsqueeze (C, last)
  C_rest = Slice (past_sink_scores, total, far, i2)
  present_sink_scores = Concat <axis: int = 2> (C_4d, C_rest)

  rows_from = CumSum <reverse: int = 1> (real_f, one)
  window_1 = Unsqueeze (window, i0)
  window_in = Min (window_1, total)
  rows_beyond_kept = Slice (rows_from, window_in, far, i1)
  batch = Shape <start: int = 0, end: int = 1> (attention_mask)
  none_shape = Concat <axis: int = 0> (batch, window_in)
  none = Expand (f0, none_shape)
  rows_beyond = Concat <axis: int = 1> (rows_beyond_kept, none)
  rows_seeing = Sub (rows_from, rows_beyond)
  rows_safe = Max (rows_seeing, f1)
  rows_3d = Unsqueeze (rows_safe, i1)
  a = Div (C, rows_3d)

  threshold = Unsqueeze (thresholds, last)
  mode = Constant <value_string: string = @threshold_mode> ()
@@is_relative@@
  num_real = ReduceSum <keepdims: int = 1> (real_f, i1)
  num_real_safe = Max (num_real, f1)
  num_real_3d = Unsqueeze (num_real_safe, i1)
  tau_relative = Div (threshold, num_real_3d)
  tau = Where (is_relative, tau_relative, threshold)
  over = Greater (a, tau)
  not_initial = Greater (real_so_far, f1)
  eligible = And (not_initial, real)
  eligible_3d = Unsqueeze (eligible, i1)
  K_3d = And (over, eligible_3d)
  K = Unsqueeze (K_3d, i2)

  A_sinks = Where (K, A, f0)
  A_rest = Where (K, f0, A)
  s = ReduceSum (A_sinks, last)
  n = ReduceSum (A_rest, last)
  smallest = Constant <value_float: float = 1e-6> ()
  has_rest = Greater (n, smallest)
  n_safe = Where (has_rest, n, f1)
  beta = Unsqueeze (betas, map_axes)
  stronger = Sub (beta, f1)
  wanted = Mul (stronger, s)
  is_clamped = Greater (wanted, n)
  s_safe = Where (is_clamped, s, f1)
  all_of_it = Div (n, s_safe)
  clamped_gain = Add (f1, all_of_it)
  on_sinks = Where (is_clamped, clamped_gain, beta)
  taken = Div (wanted, n_safe)
  rest_gain = Sub (f1, taken)
  on_rest = Where (is_clamped, f0, rest_gain)
  moved_sinks = Mul (A_sinks, on_sinks)
  moved_rest = Mul (A_rest, on_rest)
  moved = Add (moved_sinks, moved_rest)
  A_calibrated = Where (has_rest, moved, A)

  group_0 = Div (heads_all, heads_kv)
  heads_of_values = Div (heads, group_0)
  values_calibrated = Gather <axis: int = 1> (values, heads_of_values)
  mixed_calibrated = MatMul (A_calibrated, values_calibrated)
  heads_first = Transpose <perm: ints = [1, 0, 2, 3]> (mixed)
  calibrated_first = Transpose <perm: ints = [1, 0, 2, 3]> (mixed_calibrated)
  merged_first = ScatterND (heads_first, head_indices, calibrated_first)
  merged = Transpose <perm: ints = [1, 2, 0, 3]> (merged_first)
"""

_IS_RELATIVE = """
  relative_word = Constant <value_string: string = "relative"> ()
  is_relative = Equal (mode, relative_word)
"""
_OPSET_OF_EQUAL_STRINGS = 19
_IS_RELATIVE_BY_COUNT = """
  mode_1d = Unsqueeze (mode, i0)
  times_relative = TfIdfVectorizer <mode: string = "TF", pool_strings: strings = ["relative"], min_gram_length: int = 1,
    max_gram_length: int = 1, max_skip_count: int = 0, ngram_counts: ints = [0], ngram_indexes: ints = [0]> (mode_1d)
  is_relative = Greater (times_relative, f0)
"""

_LOG_SUM_EXP = "      log_sum = ReduceLogSumExp (masked, last)"
_OPSET_OF_AXES_AS_INPUT = 18
_LOG_SUM_EXP_BY_ATTRIBUTE = "      log_sum = ReduceLogSumExp <axes: ints = [-1]> (masked)"

_UNCALIBRATED = """
  merged = Transpose <perm: ints = [0, 2, 1, 3]> (mixed)
"""

_OUTPUT = """
  joined_shape = Constant <value_ints: ints = [0, 0, -1]> ()
  output_f = Reshape (merged, joined_shape)
  output = CastLike (output_f, query)
"""


def function_body(operator: str, opset: int = OPSET) -> onnx.FunctionProto:
    """The function of `schema.CALIBRATED` or `schema.PLAIN`.

    Args:
        operator: One of these.
        opset: Version of the standard operators, 15 or newer; it must be that of the model around it.
    """
    described = schema.schema(operator)
    body = _ATTENTION_MAP + (_CALIBRATION if operator == schema.CALIBRATED else _UNCALIBRATED) + _OUTPUT
    body = body.replace("@@initial@@", _INITIAL if operator == schema.CALIBRATED else _NO_INITIAL)
    body = body.replace("@@is_relative@@", _IS_RELATIVE if opset >= _OPSET_OF_EQUAL_STRINGS else _IS_RELATIVE_BY_COUNT)
    log_sum_exp = _LOG_SUM_EXP if opset >= _OPSET_OF_AXES_AS_INPUT else _LOG_SUM_EXP_BY_ATTRIBUTE
    body = body.replace("@@log_sum_exp@@", log_sum_exp).replace("@@no_sink@@", str(schema.NO_SINK_LOGIT))
    text = f"""
<opset_import: ["" : {opset}], domain: "{schema.DOMAIN}">
{operator} <{", ".join(schema.attribute_names(operator))}>
  ({", ".join(i.name for i in described.inputs)}) => ({", ".join(o.name for o in described.outputs)}) {{ {body} }}
"""
    function = onnx.parser.parse_function(text)
    defaults = schema.attribute_defaults(operator)
    required = [name for name in function.attribute if name not in defaults]
    del function.attribute[:]
    function.attribute.extend(required)
    function.attribute_proto.extend(onnx.helper.make_attribute(name, value) for name, value in defaults.items())
    return function

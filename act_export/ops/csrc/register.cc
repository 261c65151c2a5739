// The entry point that ONNX Runtime looks for, the table of operators, and their types and shapes.
#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "argument_checks.h"
#include "attention_operator.h"
#include "float16.h"
#include "node.h"
#include "ort_abi.h"
#include "ort_context.h"

#ifdef ACT_CUDA_KERNELS
#include "attention_cuda_operator.h"
#endif

namespace act {
namespace {

constexpr char kDomain[] = "act";

constexpr char kCpu[] = "CPUExecutionProvider";

struct Description {
  const char* name;
  bool calibrated;
  ort::ElementType type;
  const char* provider;
  NodeMaker* make_node;
};

// Without CUDA kernels nothing is there for the CUDA provider: a session on a GPU then runs these nodes on the CPU.
constexpr Description kOperators[] = {
    {"CalibratedAttention", true, ort::kFloat, kCpu, MakeCpuNode<float>},
    {"CalibratedAttention", true, ort::kFloat16, kCpu, MakeCpuNode<Float16>},
    {"CalibratedAttention", true, ort::kBFloat16, kCpu, MakeCpuNode<BFloat16>},
    {"Attention", false, ort::kFloat, kCpu, MakeCpuNode<float>},
    {"Attention", false, ort::kFloat16, kCpu, MakeCpuNode<Float16>},
    {"Attention", false, ort::kBFloat16, kCpu, MakeCpuNode<BFloat16>},
#ifdef ACT_CUDA_KERNELS
    {"CalibratedAttention", true, ort::kFloat, cuda::kProvider, cuda::MakeNode<float>},
    {"CalibratedAttention", true, ort::kFloat16, cuda::kProvider, cuda::MakeNode<Float16>},
    {"CalibratedAttention", true, ort::kBFloat16, cuda::kProvider, cuda::MakeNode<BFloat16>},
    {"Attention", false, ort::kFloat, cuda::kProvider, cuda::MakeNode<float>},
    {"Attention", false, ort::kFloat16, cuda::kProvider, cuda::MakeNode<Float16>},
    {"Attention", false, ort::kBFloat16, cuda::kProvider, cuda::MakeNode<BFloat16>},
#endif
};

// A description as ONNX Runtime wants it.
struct Operator : ort::CustomOp, Description {
  const ort::Api& api;

  Operator(const Description& description, const ort::Api& api);
};

// What one node keeps between calls.
struct Kernel {
  const Operator& op;
  std::unique_ptr<Node> node;
};

const Operator& AsOperator(const ort::CustomOp* op) { return *static_cast<const Operator*>(op); }

// query, key, value, past_key, past_value, [past_sink_scores,] attention_mask [, calibration].
size_t MaskIndex(const Operator& op) { return op.calibrated ? 6 : 5; }

size_t InputCount(const Operator& op) { return op.calibrated ? 8 : 6; }

ort::ElementType InputType(const Operator& op, size_t index) {
  if (index < 5) return op.type;
  return index == MaskIndex(op) ? ort::kInt64 : ort::kFloat;
}

// output, present_key, present_value, [present_sink_scores].
ort::ElementType OutputType(const Operator& op, size_t index) { return index < 3 ? op.type : ort::kFloat; }

ort::Status* ACT_ORT_CALL MakeKernel(const ort::CustomOp* op, const ort::Api* api, const ort::KernelInfo* info,
                                     void** kernel) {
  return ort::Guard(*api, AsOperator(op).name, [&] {
    *kernel = new Kernel{AsOperator(op), AsOperator(op).make_node(*api, info, AsOperator(op).calibrated)};
  });
}

ort::Status* ACT_ORT_CALL Compute(void* data, ort::KernelContext* context) {
  const auto& kernel = *static_cast<const Kernel*>(data);
  return ort::Guard(kernel.op.api, kernel.op.name, [&] { kernel.node->Run(context); });
}

// A dimension that is known, or has a name, or neither (value -1, empty name).
struct Dimension {
  int64_t value = -1;
  std::string name;

  bool Known() const { return value >= 0 || !name.empty(); }
};

using SymbolicShape = std::vector<Dimension>;

// Empty where the input's shape is not known.
SymbolicShape InputShape(const ort::Api& api, const ort::ShapeInferContext* context, size_t index) {
  ort::TensorTypeAndShapeInfo* info = nullptr;
  ort::Check(api, api.ShapeInferContext_GetInputTypeShape(context, index, &info));
  size_t rank = 0;
  ort::Check(api, api.GetDimensionsCount(info, &rank));
  ort::Shape values(rank);
  std::vector<const char*> names(rank);
  ort::Check(api, api.GetDimensions(info, values.data(), rank));
  ort::Check(api, api.GetSymbolicDimensions(info, names.data(), rank));
  SymbolicShape shape(rank);
  for (size_t i = 0; i < rank; ++i) shape[i] = {values[i], names[i] == nullptr ? "" : names[i]};
  return shape;
}

ort::ElementType InputElementType(const ort::Api& api, const ort::ShapeInferContext* context, size_t index) {
  ort::TensorTypeAndShapeInfo* info = nullptr;
  ort::ElementType type = ort::kUndefined;
  ort::Check(api, api.ShapeInferContext_GetInputTypeShape(context, index, &info));
  ort::Check(api, api.GetTensorElementType(info, &type));
  return type;
}

// Sets a shape only where every dimension has a value or a name: a made-up name would declare sizes equal that are not.
void SetOutputShape(const ort::Api& api, ort::ShapeInferContext* context, size_t index, ort::ElementType type,
                    const SymbolicShape& shape) {
  ort::Shape values;
  std::vector<const char*> names;
  for (const Dimension& dimension : shape) {
    if (!dimension.Known()) return;
    values.push_back(dimension.value);
    names.push_back(dimension.value >= 0 ? "" : dimension.name.c_str());
  }
  ort::TensorTypeAndShapeInfo* info = nullptr;
  ort::Check(api, api.CreateTensorTypeAndShapeInfo(&info));
  ort::Status* status = api.SetTensorElementType(info, type);
  if (status == nullptr) status = api.SetDimensions(info, values.data(), values.size());
  if (status == nullptr) status = api.SetSymbolicDimensions(info, names.data(), names.size());
  if (status == nullptr) status = api.ShapeInferContext_SetOutputTypeShape(context, index, info);
  api.ReleaseTensorTypeAndShapeInfo(info);
  ort::Check(api, status);
}

constexpr size_t kLongestName = 200;  // of a dimension

// The longer of the past buffer and the mask.
Dimension PresentLength(const Dimension& past, const Dimension& total) {
  if (past.value >= 0 && total.value >= 0) return {std::max(past.value, total.value), ""};
  if (past.value == 0) return total;
  if (past.value >= 0 || total.value >= 0 || !past.Known() || !total.Known()) return {};
  // In a long chain of nodes, or of long names, these would take more memory than the model.
  if (past.name.size() + total.name.size() > kLongestName) return {};
  return {-1, "max(" + past.name + ", " + total.name + ")"};
}

void InferShapes(const Operator& op, ort::ShapeInferContext* context) {
  const ort::Api& api = op.api;
  size_t input_count = 0;
  ort::Check(api, api.ShapeInferContext_GetInputCount(context, &input_count));
  if (input_count != op.GetInputTypeCount(&op)) return;
  // Not op.type: whatever the node's type is, ONNX Runtime asks the first operator of this name.
  const ort::ElementType type = InputElementType(api, context, 0);
  const SymbolicShape query = InputShape(api, context, 0);
  const SymbolicShape past_key = InputShape(api, context, 3);
  const SymbolicShape past_value = InputShape(api, context, 4);
  const SymbolicShape mask = InputShape(api, context, MaskIndex(op));
  if (query.size() == 3 && past_key.size() == 4 && past_value.size() == 4) {
    const int64_t key_size = past_key[3].value;
    const int64_t value_size = past_value[3].value;
    Dimension width;  // num_heads * value_head_size
    const auto is_size = [](int64_t size) { return size > 0 && size <= kMostHeadSize; };
    if (is_size(key_size) && is_size(value_size) && query[2].value >= 0 && query[2].value / key_size <= kMostHeads) {
      width.value = query[2].value / key_size * value_size;
    }
    SetOutputShape(api, context, 0, type, {query[0], query[1], width});
  }
  const auto infer_present = [&](size_t output, ort::ElementType type, SymbolicShape past) {
    if (past.size() != 4 || mask.size() != 2) return;
    past[2] = PresentLength(past[2], mask[1]);
    SetOutputShape(api, context, output, type, past);
  };
  infer_present(1, type, past_key);
  infer_present(2, type, past_value);
  if (op.calibrated) infer_present(3, ort::kFloat, InputShape(api, context, 5));
}

ort::Status* ACT_ORT_CALL InferOutputShapes(const ort::CustomOp* op, ort::ShapeInferContext* context) {
  try {
    InferShapes(AsOperator(op), context);
  } catch (...) {
    // Shapes are a help, never a reason to refuse a model; and ONNX Runtime ignores, and leaks, a status from here.
  }
  return nullptr;
}

Operator::Operator(const Description& description, const ort::Api& api) : Description(description), api(api) {
  GetName = [](const ort::CustomOp* op) { return AsOperator(op).name; };
  GetExecutionProviderType = [](const ort::CustomOp* op) { return AsOperator(op).provider; };
  GetInputType = [](const ort::CustomOp* op, size_t index) { return InputType(AsOperator(op), index); };
  GetInputTypeCount = [](const ort::CustomOp* op) { return InputCount(AsOperator(op)); };
  GetOutputType = [](const ort::CustomOp* op, size_t index) { return OutputType(AsOperator(op), index); };
  GetOutputTypeCount = [](const ort::CustomOp* op) { return size_t{AsOperator(op).calibrated ? 4u : 3u}; };
  GetInputCharacteristic = [](const ort::CustomOp*, size_t) { return ort::kRequired; };
  GetOutputCharacteristic = [](const ort::CustomOp*, size_t) { return ort::kRequired; };
  GetInputMemoryType = [](const ort::CustomOp*, size_t) { return ort::kMemoryDefault; };
  GetStartVersion = [](const ort::CustomOp*) { return 1; };
  CreateKernelV2 = MakeKernel;
  KernelComputeV2 = Compute;
  KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  InferOutputShapeFn = InferOutputShapes;
}

// One for each ONNX Runtime in the process. Never freed: sessions keep a pointer to it and to its operators, and
// nothing tells when the last of them has gone.
ort::CustomOpDomain* Domain(const ort::Api& api) {
  static std::mutex mutex;
  static auto& domains = *new std::map<const ort::Api*, ort::CustomOpDomain*>();
  const std::lock_guard<std::mutex> lock(mutex);
  ort::CustomOpDomain*& domain = domains[&api];
  if (domain == nullptr) {
    ort::CustomOpDomain* created = nullptr;
    ort::Check(api, api.CreateCustomOpDomain(kDomain, &created));
    for (const Description& description : kOperators) {
      ort::Check(api, api.CustomOpDomain_Add(created, new Operator(description, api)));
    }
    domain = created;
  }
  return domain;
}

}  // namespace
}  // namespace act

extern "C" ACT_EXPORT act::ort::Status* ACT_ORT_CALL RegisterCustomOps(act::ort::SessionOptions* options,
                                                                       const act::ort::ApiBase* base) {
  const act::ort::Api* api = base->GetApi(act::ort::kApiVersion);
  if (api == nullptr) return nullptr;  // older than 1.18: without its functions there is no way to report it
  return act::ort::Guard(*api, "act",
                         [&] { act::ort::Check(*api, api->AddCustomOpDomain(options, act::Domain(*api))); });
}

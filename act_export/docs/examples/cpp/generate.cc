// Greedy generation with ONNX Runtime alone: generate MODEL LIBRARY COUNT TOKEN... [calibration=FILE]
//
// Prints COUNT new tokens after the prompt's. LIBRARY is libact_ops.so, with a slash in its path. FILE is a calibration
// for this request, as `act-export adapter MODEL --calibration C --out FILE.bin` writes it. The key-value cache
// and the sink state are whatever inputs the model has that begin with "past": each is a buffer for the whole run,
// bound as the input and as the output that continues it, so that a step writes into it and copies nothing.
#include <onnxruntime_cxx_api.h>

#include <cstdint>
#include <exception>
#include <fstream>
#include <iostream>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

const Ort::MemoryInfo& Cpu() {
  static const Ort::MemoryInfo info = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  return info;
}

// A view of numbers that the caller keeps.
Ort::Value View(std::vector<int64_t>& numbers, const std::vector<int64_t>& shape) {
  return Ort::Value::CreateTensor<int64_t>(Cpu(), numbers.data(), numbers.size(), shape.data(), shape.size());
}

// past_key_values.0.key -> present.0.key, past_sink_scores.0 -> present_sink_scores.0
std::string PresentName(const std::string& past) {
  const std::string cache = "past_key_values";
  return "present" + past.substr(past.rfind(cache, 0) == 0 ? cache.size() : std::string("past").size());
}

// An empty buffer (1, heads, capacity, size) for a state input (batch, heads, past, size).
Ort::Value Buffer(const std::string& name, const Ort::TypeInfo& type, int64_t capacity) {
  const auto info = type.GetTensorTypeAndShapeInfo();
  std::vector<int64_t> shape = info.GetShape();
  if (shape.size() != 4 || shape[1] < 1 || shape[3] < 1) {
    throw std::runtime_error("the model doesn't say how many heads " + name + " has, and of which size");
  }
  shape[0] = 1;
  shape[2] = capacity;
  Ort::AllocatorWithDefaultOptions allocator;
  return Ort::Value::CreateTensor(allocator, shape.data(), shape.size(), info.GetElementType());
}

// float16 is compared by its bits, whose order is that of the numbers but for the sign.
int Key(uint16_t bits) { return bits & 0x8000 ? -(bits & 0x7fff) : bits; }
float Key(float number) { return number; }

template <typename T>
int64_t Largest(const T* numbers, int64_t count) {
  int64_t best = 0;
  for (int64_t i = 1; i < count; ++i) {
    if (Key(numbers[i]) > Key(numbers[best])) best = i;
  }
  return best;
}

// The likeliest token after the last position of logits (1, positions, vocabulary).
int64_t NextToken(Ort::Value& logits) {
  const auto info = logits.GetTensorTypeAndShapeInfo();
  const int64_t vocabulary = info.GetShape().at(2);
  const size_t last = info.GetElementCount() - vocabulary;
  switch (info.GetElementType()) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      return Largest(logits.GetTensorMutableData<float>() + last, vocabulary);
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      return Largest(reinterpret_cast<uint16_t*>(logits.GetTensorMutableData<Ort::Float16_t>()) + last, vocabulary);
    default:
      throw std::runtime_error("logits of this type can't be read here");
  }
}

class Generator {
 public:
  // `calibration`: beta, gamma and threshold of each head that the model can calibrate; empty for its default.
  Generator(Ort::Session& session, int64_t capacity, std::vector<float> calibration)
      : session_(session), binding_(session), calibration_(std::move(calibration)) {
    Ort::AllocatorWithDefaultOptions allocator;
    binding_.BindOutput("logits", Cpu());  // first, so that it is the first of the outputs
    for (size_t i = 0; i < session.GetInputCount(); ++i) {
      const std::string name = session.GetInputNameAllocated(i, allocator).get();
      if (name.rfind("past", 0) == 0) {
        state_.push_back(Buffer(name, session.GetInputTypeInfo(i), capacity));
        binding_.BindInput(name.c_str(), state_.back());
        binding_.BindOutput(PresentName(name).c_str(), state_.back());
      } else if (name == "position_ids") {
        takes_positions_ = true;
      } else if (name != "input_ids" && name != "attention_mask") {
        throw std::runtime_error("the model has an input that isn't known here: " + name);
      }
    }
    for (size_t i = 0; i < session.GetOverridableInitializerCount(); ++i) {
      if (session.GetOverridableInitializerNameAllocated(i, allocator).get() == std::string("logits_to_keep")) {
        Ort::Value last = Ort::Value::CreateTensor<int64_t>(Cpu(), &keep_, 1, nullptr, 0);
        binding_.BindInput("logits_to_keep", last);
      }
    }
    if (!calibration_.empty()) {  // adapters have no effect on bound inputs, so it is bound itself
      const std::vector<int64_t> shape = {1, static_cast<int64_t>(calibration_.size() / 3), 3};
      binding_.BindInput("calibration", Ort::Value::CreateTensor<float>(Cpu(), calibration_.data(), calibration_.size(),
                                                                        shape.data(), shape.size()));
    }
  }

  // Runs the model over new tokens, which follow those it has seen; returns the likeliest next one.
  int64_t Step(std::vector<int64_t> tokens) {
    const int64_t count = static_cast<int64_t>(tokens.size());
    std::vector<int64_t> positions(tokens.size());
    std::iota(positions.begin(), positions.end(), seen_);
    seen_ += count;
    std::vector<int64_t> mask(seen_, 1);
    binding_.BindInput("input_ids", View(tokens, {1, count}));
    binding_.BindInput("attention_mask", View(mask, {1, seen_}));
    if (takes_positions_) binding_.BindInput("position_ids", View(positions, {1, count}));
    session_.Run(Ort::RunOptions{}, binding_);
    std::vector<Ort::Value> outputs = binding_.GetOutputValues();
    return NextToken(outputs.front());
  }

 private:
  Ort::Session& session_;
  Ort::IoBinding binding_;
  std::vector<Ort::Value> state_;
  int64_t seen_ = 0;
  int64_t keep_ = 1;  // logits of the last position only
  std::vector<float> calibration_;
  bool takes_positions_ = false;
};

std::vector<float> ReadNumbers(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) throw std::runtime_error("can't read " + path);
  std::vector<float> numbers(static_cast<size_t>(file.tellg()) / sizeof(float));
  file.seekg(0);
  file.read(reinterpret_cast<char*>(numbers.data()), static_cast<std::streamsize>(numbers.size() * sizeof(float)));
  return numbers;
}

int Main(const std::string& model, const std::string& library, int count, std::vector<int64_t> prompt,
         std::vector<float> calibration) {
  Ort::Env env(ORT_LOGGING_LEVEL_ERROR);
  Ort::SessionOptions options;
  options.RegisterCustomOpsLibrary(library.c_str());
  Ort::Session session(env, model.c_str(), options);
  Generator generator(session, static_cast<int64_t>(prompt.size()) + count, std::move(calibration));
  std::vector<int64_t> tokens = std::move(prompt);
  for (int i = 0; i < count; ++i) {
    tokens = {generator.Step(std::move(tokens))};
    std::cout << tokens.front() << (i + 1 < count ? " " : "\n") << std::flush;
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 5) {
    std::cerr << "usage: generate MODEL LIBRARY COUNT TOKEN... [calibration=FILE]\n";
    return 2;
  }
  try {
    std::vector<int64_t> prompt;
    std::vector<float> calibration;
    const std::string option = "calibration=";
    for (int i = 4; i < argc; ++i) {
      const std::string argument = argv[i];
      if (argument.rfind(option, 0) == 0) {
        calibration = ReadNumbers(argument.substr(option.size()));
      } else {
        prompt.push_back(std::stoll(argument));
      }
    }
    return Main(argv[1], argv[2], std::stoi(argv[3]), std::move(prompt), std::move(calibration));
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
}

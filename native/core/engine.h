// A plan on the device: the engine with its weights, and one execution context for each profile that is used, since
// switching a context's profile uploads its resources again; CUDA graphs have contexts of their own. Contexts own no scratch
// memory: launches run one after another, so one block of the largest size is enough for all of them (executor.h).
#pragma once

#include <NvInferRuntime.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "device.h"
#include "logger.h"
#include "tensorrt_library.h"

namespace flowturbo {

enum class ElementType { kFloat32, kInt64 };

uint64_t bytesOf(ElementType type);

// An input or output of an engine.
struct EngineTensor {
  std::string name;
  bool input = false;
  ElementType type = ElementType::kFloat32;
};

// Dimensions of every tensor, in the engine's order; those of outputs are empty until a context knows them.
using TensorShapes = std::vector<std::vector<int64_t>>;

// Bytes of the device that engines take besides what they are given.
struct EngineMemory {
  // As the library says.
  std::atomic<uint64_t> weights{0};
  // By how much the free memory shrank while they were made and first launched. What others allocate or free at that moment
  // is in it too.
  std::atomic<uint64_t> contexts{0};
};

class Engine;

// To be used on the executor's issuing thread alone.
class Context {
 public:
  // Throws Error: LAUNCH, DEVICE_MEMORY, CUDA.
  Context(const Engine& engine, int32_t profile, CUstream_st* stream);
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  // Of every input and output; an operand must hold at least so many bytes.
  const TensorShapes& shapes() const noexcept { return shapes_; }
  const std::vector<uint64_t>& bytes() const noexcept { return bytes_; }

  // Throws Error with the library's messages: LAUNCH, or DEVICE_MEMORY where they say so.
  void bind(size_t tensor, DevicePointer address);
  void useScratch(DevicePointer address, uint64_t bytes);
  void enqueue(CUstream_st* stream);
  // Whether TensorRT allows the next launch in a CUDA graph.
  bool capturable(CUstream_st* stream) const;

 private:
  void configure(int32_t profile, CUstream_st* stream);
  template <typename Body>
  void measured(Body body);
  Error refused(const std::string& what) const;

  const Engine& engine_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
  TensorShapes shapes_;
  std::vector<uint64_t> bytes_;
  std::vector<DevicePointer> bound_;
  DevicePointer scratch_ = 0;
  uint64_t scratchBytes_ = 0;
  bool launched_ = false;
  uint64_t ownBytes_ = 0;
};

class Engine {
 public:
  // Deserialises a plan, whose file must still be what `identity` says (files.h). The device has to be the calling
  // thread's. Throws Error: DEVICE_MEMORY before anything is read if the weights cannot fit; PLAN_CHANGED, IO; PLAN for
  // one that the library refuses, or that holds what this package does not run.
  Engine(std::shared_ptr<const TensorRtLibrary> library, std::shared_ptr<const Device> device,
         std::shared_ptr<EngineMemory> memory, const std::string& plan, const std::string& identity);
  ~Engine();

  const std::vector<EngineTensor>& tensors() const noexcept { return tensors_; }
  // Shapes of the inputs, profile by profile.
  const std::vector<TensorShapes>& profiles() const noexcept { return profiles_; }
  // Scratch memory that a launch in a profile needs.
  uint64_t scratchBytes(size_t profile) const { return scratchBytes_.at(profile); }
  uint64_t planBytes() const noexcept { return planBytes_; }
  // On the device.
  uint64_t weightBytes() const noexcept { return weightBytes_; }

  // On the issuing thread: the context of a profile, made at first use.
  Context& context(size_t profile, CUstream_st* stream);
  // Another one, which must be destroyed before the engine.
  std::unique_ptr<Context> createContext(size_t profile, CUstream_st* stream) const;

 private:
  friend class Context;

  std::shared_ptr<const TensorRtLibrary> library_;
  std::shared_ptr<const Device> device_;
  std::shared_ptr<EngineMemory> memory_;
  Logger::Taken logger_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::vector<EngineTensor> tensors_;
  std::vector<TensorShapes> profiles_;
  std::vector<uint64_t> scratchBytes_;
  // Destroyed before the engine.
  std::vector<std::unique_ptr<Context>> contexts_;
  uint64_t planBytes_ = 0;
  uint64_t weightBytes_ = 0;
};

}  // namespace flowturbo

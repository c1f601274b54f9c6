// Every function of the interfaces that the addon calls TensorRT through, from the headers' own tables (NvInferImpl.h),
// which differ between the two libraries. A call of one that the simulation does not implement is a violation.
#pragma once

#include <NvInferRuntime.h>

#include <cstdlib>

#include "machine.h"

namespace nvinfer1 {

inline void unexpected(const char* call) { machine::violate(call); }

class RuntimeConfigStub : public IRuntimeConfig, public apiv::VRuntimeConfig {
 public:
  RuntimeConfigStub() { mImpl = this; }

  IRuntimeConfig* getPImpl() noexcept override { return this; }
  void setExecutionContextAllocationStrategy(ExecutionContextAllocationStrategy) noexcept override {
    unexpected("setExecutionContextAllocationStrategy");
  }
  ExecutionContextAllocationStrategy getExecutionContextAllocationStrategy() const noexcept override {
    unexpected("getExecutionContextAllocationStrategy");
    return {};
  }
#if defined(TRT_MAJOR_RTX)
  IRuntimeCache* createRuntimeCache() const noexcept override {
    unexpected("createRuntimeCache");
    return {};
  }
  bool setRuntimeCache(IRuntimeCache const&) noexcept override {
    unexpected("setRuntimeCache");
    return {};
  }
  IRuntimeCache* getRuntimeCache() const noexcept override {
    unexpected("getRuntimeCache");
    return {};
  }
  void setDynamicShapesKernelSpecializationStrategy(DynamicShapesKernelSpecializationStrategy) noexcept override {
    unexpected("setDynamicShapesKernelSpecializationStrategy");
  }
  DynamicShapesKernelSpecializationStrategy getDynamicShapesKernelSpecializationStrategy() const noexcept override {
    unexpected("getDynamicShapesKernelSpecializationStrategy");
    return {};
  }
  bool setCudaGraphStrategy(CudaGraphStrategy) noexcept override {
    unexpected("setCudaGraphStrategy");
    return {};
  }
  CudaGraphStrategy getCudaGraphStrategy() const noexcept override {
    unexpected("getCudaGraphStrategy");
    return {};
  }
#endif
};

class RuntimeStub : public IRuntime, public apiv::VRuntime {
 public:
  RuntimeStub() { mImpl = this; }

  IRuntime* getPImpl() noexcept override { return this; }
  ICudaEngine* deserializeCudaEngine(void const*, std::size_t) noexcept override {
    unexpected("deserializeCudaEngine");
    return {};
  }
  void setDLACore(int32_t) noexcept override { unexpected("setDLACore"); }
  int32_t getDLACore() const noexcept override {
    unexpected("getDLACore");
    return {};
  }
  int32_t getNbDLACores() const noexcept override {
    unexpected("getNbDLACores");
    return {};
  }
  void setGpuAllocator(IGpuAllocator*) noexcept override { unexpected("setGpuAllocator"); }
  void setErrorRecorder(IErrorRecorder*) noexcept override { unexpected("setErrorRecorder"); }
  IErrorRecorder* getErrorRecorder() const noexcept override {
    unexpected("getErrorRecorder");
    return {};
  }
  ILogger* getLogger() const noexcept override {
    unexpected("getLogger");
    return {};
  }
  bool setMaxThreads(int32_t) noexcept override {
    unexpected("setMaxThreads");
    return {};
  }
  int32_t getMaxThreads() const noexcept override {
    unexpected("getMaxThreads");
    return {};
  }
  void setTemporaryDirectory(char const*) noexcept override { unexpected("setTemporaryDirectory"); }
  char const* getTemporaryDirectory() const noexcept override {
    unexpected("getTemporaryDirectory");
    return {};
  }
  void setTempfileControlFlags(TempfileControlFlags) noexcept override { unexpected("setTempfileControlFlags"); }
  TempfileControlFlags getTempfileControlFlags() const noexcept override {
    unexpected("getTempfileControlFlags");
    return {};
  }
  IPluginRegistry& getPluginRegistry() noexcept override { unexpected("getPluginRegistry"), std::abort(); }
  void setPluginRegistryParent(IPluginRegistry*) noexcept override { unexpected("setPluginRegistryParent"); }
  IRuntime* loadRuntime(char const*) noexcept override {
    unexpected("loadRuntime");
    return {};
  }
  void setEngineHostCodeAllowed(bool) noexcept override { unexpected("setEngineHostCodeAllowed"); }
  bool getEngineHostCodeAllowed() const noexcept override {
    unexpected("getEngineHostCodeAllowed");
    return {};
  }
  ICudaEngine* deserializeCudaEngineV2(IStreamReaderV2&) noexcept override {
    unexpected("deserializeCudaEngineV2");
    return {};
  }
  bool setDLAWorkspaceAllocationStrategy(DLAWorkspaceAllocationStrategy) noexcept override {
    unexpected("setDLAWorkspaceAllocationStrategy");
    return {};
  }
  DLAWorkspaceAllocationStrategy getDLAWorkspaceAllocationStrategy() const noexcept override {
    unexpected("getDLAWorkspaceAllocationStrategy");
    return {};
  }
#if defined(TRT_MAJOR_RTX)
  int64_t getEngineHeaderSize() const noexcept override {
    unexpected("getEngineHeaderSize");
    return {};
  }
  EngineValidity getEngineValidity(void const*, int64_t, uint64_t*) const noexcept override {
    unexpected("getEngineValidity");
    return {};
  }
  void setDeferredWeightsLoading(bool) noexcept override { unexpected("setDeferredWeightsLoading"); }
  bool getDeferredWeightsLoading() const noexcept override {
    unexpected("getDeferredWeightsLoading");
    return {};
  }
#endif
};

class EngineStub : public ICudaEngine, public apiv::VCudaEngine {
 public:
  EngineStub() { mImpl = this; }

  ICudaEngine* getPImpl() noexcept override { return this; }
  int32_t getNbLayers() const noexcept override {
    unexpected("getNbLayers");
    return {};
  }
  IHostMemory* serialize() const noexcept override {
    unexpected("serialize");
    return {};
  }
  IExecutionContext* createExecutionContext(ExecutionContextAllocationStrategy) noexcept override {
    unexpected("createExecutionContext");
    return {};
  }
  bool isRefittable() const noexcept override {
    unexpected("isRefittable");
    return {};
  }
  char const* getName() const noexcept override {
    unexpected("getName");
    return {};
  }
  int32_t getNbOptimizationProfiles() const noexcept override {
    unexpected("getNbOptimizationProfiles");
    return {};
  }
  EngineCapability getEngineCapability() const noexcept override {
    unexpected("getEngineCapability");
    return {};
  }
  void setErrorRecorder(IErrorRecorder*) noexcept override { unexpected("setErrorRecorder"); }
  IErrorRecorder* getErrorRecorder() const noexcept override {
    unexpected("getErrorRecorder");
    return {};
  }
  TacticSources getTacticSources() const noexcept override {
    unexpected("getTacticSources");
    return {};
  }
  ProfilingVerbosity getProfilingVerbosity() const noexcept override {
    unexpected("getProfilingVerbosity");
    return {};
  }
  IEngineInspector* createEngineInspector() const noexcept override {
    unexpected("createEngineInspector");
    return {};
  }
  Dims getTensorShape(char const*) const noexcept override {
    unexpected("getTensorShape");
    return Dims{};
  }
  DataType getTensorDataType(char const*) const noexcept override {
    unexpected("getTensorDataType");
    return {};
  }
  TensorLocation getTensorLocation(char const*) const noexcept override {
    unexpected("getTensorLocation");
    return {};
  }
  bool isShapeInferenceIO(char const*) const noexcept override {
    unexpected("isShapeInferenceIO");
    return {};
  }
  TensorIOMode getTensorIOMode(char const*) const noexcept override {
    unexpected("getTensorIOMode");
    return {};
  }
  int32_t getTensorBytesPerComponent(char const*) const noexcept override {
    unexpected("getTensorBytesPerComponent");
    return {};
  }
  int32_t getTensorComponentsPerElement(char const*) const noexcept override {
    unexpected("getTensorComponentsPerElement");
    return {};
  }
  TensorFormat getTensorFormat(char const*) const noexcept override {
    unexpected("getTensorFormat");
    return {};
  }
  char const* getTensorFormatDesc(char const*) const noexcept override {
    unexpected("getTensorFormatDesc");
    return {};
  }
  int32_t getTensorVectorizedDim(char const*) const noexcept override {
    unexpected("getTensorVectorizedDim");
    return {};
  }
  Dims getProfileShape(char const*, int32_t, OptProfileSelector) const noexcept override {
    unexpected("getProfileShape");
    return Dims{};
  }
  int32_t getNbIOTensors() const noexcept override {
    unexpected("getNbIOTensors");
    return {};
  }
  char const* getIOTensorName(int32_t) const noexcept override {
    unexpected("getIOTensorName");
    return {};
  }
  HardwareCompatibilityLevel getHardwareCompatibilityLevel() const noexcept override {
    unexpected("getHardwareCompatibilityLevel");
    return {};
  }
  int32_t getNbAuxStreams() const noexcept override {
    unexpected("getNbAuxStreams");
    return {};
  }
  int32_t getTensorBytesPerComponentV2(char const*, int32_t) const noexcept override {
    unexpected("getTensorBytesPerComponentV2");
    return {};
  }
  int32_t getTensorComponentsPerElementV2(char const*, int32_t) const noexcept override {
    unexpected("getTensorComponentsPerElementV2");
    return {};
  }
  TensorFormat getTensorFormatV2(char const*, int32_t) const noexcept override {
    unexpected("getTensorFormatV2");
    return {};
  }
  char const* getTensorFormatDescV2(char const*, int32_t) const noexcept override {
    unexpected("getTensorFormatDescV2");
    return {};
  }
  int32_t getTensorVectorizedDimV2(char const*, int32_t) const noexcept override {
    unexpected("getTensorVectorizedDimV2");
    return {};
  }
  ISerializationConfig* createSerializationConfig() noexcept override {
    unexpected("createSerializationConfig");
    return {};
  }
  IHostMemory* serializeWithConfig(ISerializationConfig&) const noexcept override {
    unexpected("serializeWithConfig");
    return {};
  }
  IRefitter* createRefitter(ILogger&) noexcept override {
    unexpected("createRefitter");
    return {};
  }
  int64_t getStreamableWeightsSize() const noexcept override {
    unexpected("getStreamableWeightsSize");
    return {};
  }
  bool isDebugTensor(char const*) const noexcept override {
    unexpected("isDebugTensor");
    return {};
  }
  bool setWeightStreamingBudgetV2(int64_t) noexcept override {
    unexpected("setWeightStreamingBudgetV2");
    return {};
  }
  int64_t getWeightStreamingBudgetV2() const noexcept override {
    unexpected("getWeightStreamingBudgetV2");
    return {};
  }
  int64_t getWeightStreamingAutomaticBudget() const noexcept override {
    unexpected("getWeightStreamingAutomaticBudget");
    return {};
  }
  int64_t getWeightStreamingScratchMemorySize() const noexcept override {
    unexpected("getWeightStreamingScratchMemorySize");
    return {};
  }
  int64_t getDeviceMemorySizeV2() const noexcept override {
    unexpected("getDeviceMemorySizeV2");
    return {};
  }
  int64_t getDeviceMemorySizeForProfileV2(int32_t) const noexcept override {
    unexpected("getDeviceMemorySizeForProfileV2");
    return {};
  }
  int64_t const* getProfileTensorValuesV2(char const*, int32_t, OptProfileSelector) const noexcept override {
    unexpected("getProfileTensorValuesV2");
    return {};
  }
  IExecutionContext* createExecutionContextWithRuntimeConfig(IRuntimeConfig*) noexcept override {
    unexpected("createExecutionContextWithRuntimeConfig");
    return {};
  }
  IRuntimeConfig* createRuntimeConfig() noexcept override {
    unexpected("createRuntimeConfig");
    return {};
  }
  int64_t getEngineStat(EngineStat) const noexcept override {
    unexpected("getEngineStat");
    return {};
  }
  char const* getAliasedInputTensor(char const*) const noexcept override {
    unexpected("getAliasedInputTensor");
    return {};
  }
#if defined(TRT_MAJOR_RTX)
  bool areWeightsLoaded() const noexcept override {
    unexpected("areWeightsLoaded");
    return {};
  }
  bool loadWeights(void const*, int64_t) noexcept override {
    unexpected("loadWeights");
    return {};
  }
  bool loadWeightsAsync(IStreamReaderV2&, cudaStream_t) noexcept override {
    unexpected("loadWeightsAsync");
    return {};
  }
  bool unloadWeights() noexcept override {
    unexpected("unloadWeights");
    return {};
  }
  IWeightsManager* createWeightsManager() noexcept override {
    unexpected("createWeightsManager");
    return {};
  }
#endif
};

class ContextStub : public IExecutionContext, public apiv::VExecutionContext {
 public:
  ContextStub() { mImpl = this; }

  IExecutionContext* getPImpl() noexcept override { return this; }
  void setDebugSync(bool) noexcept override { unexpected("setDebugSync"); }
  bool getDebugSync() const noexcept override {
    unexpected("getDebugSync");
    return {};
  }
  void setProfiler(IProfiler*) noexcept override { unexpected("setProfiler"); }
  IProfiler* getProfiler() const noexcept override {
    unexpected("getProfiler");
    return {};
  }
  ICudaEngine const& getEngine() const noexcept override { unexpected("getEngine"), std::abort(); }
  void setName(char const*) noexcept override { unexpected("setName"); }
  char const* getName() const noexcept override {
    unexpected("getName");
    return {};
  }
  void setDeviceMemory(void*) noexcept override { unexpected("setDeviceMemory"); }
  int32_t getOptimizationProfile() const noexcept override {
    unexpected("getOptimizationProfile");
    return {};
  }
  bool allInputDimensionsSpecified() const noexcept override {
    unexpected("allInputDimensionsSpecified");
    return {};
  }
  void setErrorRecorder(IErrorRecorder*) noexcept override { unexpected("setErrorRecorder"); }
  IErrorRecorder* getErrorRecorder() const noexcept override {
    unexpected("getErrorRecorder");
    return {};
  }
  bool executeV2(void* const*) noexcept override {
    unexpected("executeV2");
    return {};
  }
  bool setOptimizationProfileAsync(int32_t, cudaStream_t) noexcept override {
    unexpected("setOptimizationProfileAsync");
    return {};
  }
  void setEnqueueEmitsProfile(bool) noexcept override { unexpected("setEnqueueEmitsProfile"); }
  bool getEnqueueEmitsProfile() const noexcept override {
    unexpected("getEnqueueEmitsProfile");
    return {};
  }
  bool reportToProfiler() const noexcept override {
    unexpected("reportToProfiler");
    return {};
  }
  bool setInputShape(char const*, Dims const&) noexcept override {
    unexpected("setInputShape");
    return {};
  }
  Dims getTensorShape(char const*) const noexcept override {
    unexpected("getTensorShape");
    return Dims{};
  }
  Dims getTensorStrides(char const*) const noexcept override {
    unexpected("getTensorStrides");
    return Dims{};
  }
  bool setTensorAddress(char const*, void*) noexcept override {
    unexpected("setTensorAddress");
    return {};
  }
  void const* getTensorAddress(char const*) const noexcept override {
    unexpected("getTensorAddress");
    return {};
  }
  bool setInputTensorAddress(char const*, void const*) noexcept override {
    unexpected("setInputTensorAddress");
    return {};
  }
  bool setOutputTensorAddress(char const*, void*) noexcept override {
    unexpected("setOutputTensorAddress");
    return {};
  }
  int32_t inferShapes(int32_t, char const**) noexcept override {
    unexpected("inferShapes");
    return {};
  }
  bool setInputConsumedEvent(cudaEvent_t) noexcept override {
    unexpected("setInputConsumedEvent");
    return {};
  }
  cudaEvent_t getInputConsumedEvent() const noexcept override {
    unexpected("getInputConsumedEvent");
    return {};
  }
  void* getOutputTensorAddress(char const*) const noexcept override {
    unexpected("getOutputTensorAddress");
    return {};
  }
  bool setOutputAllocator(char const*, IOutputAllocator*) noexcept override {
    unexpected("setOutputAllocator");
    return {};
  }
  IOutputAllocator* getOutputAllocator(char const*) noexcept override {
    unexpected("getOutputAllocator");
    return {};
  }
  int64_t getMaxOutputSize(char const*) const noexcept override {
    unexpected("getMaxOutputSize");
    return {};
  }
  bool setTemporaryStorageAllocator(IGpuAllocator*) noexcept override {
    unexpected("setTemporaryStorageAllocator");
    return {};
  }
  IGpuAllocator* getTemporaryStorageAllocator() const noexcept override {
    unexpected("getTemporaryStorageAllocator");
    return {};
  }
  bool enqueueV3(cudaStream_t) noexcept override {
    unexpected("enqueueV3");
    return {};
  }
  void setPersistentCacheLimit(size_t) noexcept override { unexpected("setPersistentCacheLimit"); }
  size_t getPersistentCacheLimit() const noexcept override {
    unexpected("getPersistentCacheLimit");
    return {};
  }
  bool setNvtxVerbosity(ProfilingVerbosity) noexcept override {
    unexpected("setNvtxVerbosity");
    return {};
  }
  ProfilingVerbosity getNvtxVerbosity() const noexcept override {
    unexpected("getNvtxVerbosity");
    return {};
  }
  void setAuxStreams(cudaStream_t*, int32_t) noexcept override { unexpected("setAuxStreams"); }
  bool setDebugListener(IDebugListener*) noexcept override {
    unexpected("setDebugListener");
    return {};
  }
  IDebugListener* getDebugListener() noexcept override {
    unexpected("getDebugListener");
    return {};
  }
  bool setTensorDebugState(char const*, bool) noexcept override {
    unexpected("setTensorDebugState");
    return {};
  }
  bool getDebugState(char const*) const noexcept override {
    unexpected("getDebugState");
    return {};
  }
  bool setAllTensorsDebugState(bool) noexcept override {
    unexpected("setAllTensorsDebugState");
    return {};
  }
  size_t updateDeviceMemorySizeForShapes() noexcept override {
    unexpected("updateDeviceMemorySizeForShapes");
    return {};
  }
  void setDeviceMemoryV2(void*, int64_t) noexcept override { unexpected("setDeviceMemoryV2"); }
  IRuntimeConfig* getRuntimeConfig() const noexcept override {
    unexpected("getRuntimeConfig");
    return {};
  }
  bool setUnfusedTensorsDebugState(bool) noexcept override {
    unexpected("setUnfusedTensorsDebugState");
    return {};
  }
  bool getUnfusedTensorsDebugState() const noexcept override {
    unexpected("getUnfusedTensorsDebugState");
    return {};
  }
  bool setCommunicator(void*) noexcept override {
    unexpected("setCommunicator");
    return {};
  }
#if defined(TRT_MAJOR_RTX)
  bool isStreamCapturable(cudaStream_t) const noexcept override {
    unexpected("isStreamCapturable");
    return {};
  }
#endif
};

}  // namespace nvinfer1

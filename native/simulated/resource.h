// TensorRT 11's builder has its kernels in a library of their own, libnvinfer_builder_resource, which it opens by name in
// the folder that setInternalLibraryPath gave, or where the loader looks; without them it makes no builder. TensorRT-RTX has
// them inside. The simulated library wants a file of that name in that folder, and never finds it elsewhere.
#pragma once

#include <NvInferRuntime.h>

// False, with TensorRT's words in the log, where the kernels are missing.
bool hasBuilderResource(nvinfer1::ILogger& logger);

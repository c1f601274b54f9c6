// The executor for JavaScript: plain objects with functions. Each holds its native object until it is released or garbage
// collected, or until its environment ends. A submission names engines by number, so that a wrong argument can never be
// taken for a native object.
#pragma once

#include <napi.h>

namespace flowturbo::binding {

// openExecutor(library, parser, ordinal)
Napi::Value openExecutor(const Napi::CallbackInfo& info);

}  // namespace flowturbo::binding

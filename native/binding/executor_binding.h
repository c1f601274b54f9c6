// The executor as JavaScript sees it: plain objects with functions, which hold what they stand for until they are told to
// let go of it, are garbage collected or lose their environment. Engines are named by number in a submission, so that no
// argument can stand for another object than it is.
#pragma once

#include <napi.h>

namespace flowturbo::binding {

// openExecutor(library, parser, ordinal)
Napi::Value openExecutor(const Napi::CallbackInfo& info);

}  // namespace flowturbo::binding

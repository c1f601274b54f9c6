// One formula of a simulated engine's plan, ready to be computed: what tensorrt.cpp fills in, and how one thread computes
// its share. The text is both C++ and CUDA C: the simulated TensorRT computes it on the host, and the stand-in for a real
// driver as a kernel (formula.cu), so that both mean the same. NVRTC has no standard headers: only built-in types here.
#pragma once

#if defined(__CUDACC__)
#define FORMULA_FUNCTION static __device__ __forceinline__
// A multiplication and an addition must not become one operation that rounds once; the compiler's flag says so too.
#define FORMULA_ADD(first, second) __fadd_rn(first, second)
#define FORMULA_SUBTRACT(first, second) __fsub_rn(first, second)
#define FORMULA_MULTIPLY(first, second) __fmul_rn(first, second)
#define FORMULA_NAN __int_as_float(0x7fc00000)
#else
#define FORMULA_FUNCTION inline
// Compiled with -ffp-contract=off, for the same reason.
#define FORMULA_ADD(first, second) ((first) + (second))
#define FORMULA_SUBTRACT(first, second) ((first) - (second))
#define FORMULA_MULTIPLY(first, second) ((first) * (second))
#define FORMULA_NAN __builtin_nanf("")
#endif

// The name of the kernel in its module.
#define FORMULA_KERNEL "flowturbo_formula"

// A kernel's parameters are at most 4 kB.
constexpr int kFormulaTokens = 96;
constexpr int kFormulaDepth = 16;
constexpr unsigned kFormulaBlock = 256;
constexpr unsigned kFormulaBlocks = 1024;
// Every byte of an engine's weights.
constexpr unsigned char kFormulaWeight = 0x5a;

enum FormulaKind : int {
  kFormulaNumber,
  kFormulaOperand,
  // The first and second half of an operand's rows.
  kFormulaUnconditional,
  kFormulaConditional,
  kFormulaAdd,
  kFormulaSubtract,
  kFormulaMultiply,
};

struct FormulaToken {
  int kind;
  // Of an operand: int64, otherwise float32.
  int integer;
  double number;
  const void* data;
  unsigned long long rows;
  unsigned long long rowElements;
};

struct FormulaLaunch {
  void* to;
  unsigned long long rows;
  unsigned long long rowElements;
  int integer;
  int count;
  // A launch whose weights were overwritten computes nothing but NaN (or the smallest integer).
  const unsigned char* weights;
  unsigned long long weightBytes;
  // That the launch takes at least.
  unsigned long long nanoseconds;
  FormulaToken tokens[kFormulaTokens];
};

static_assert(sizeof(FormulaToken) == 40, "the same on the host and on the device");
static_assert(sizeof(FormulaLaunch) == 56 + 40 * kFormulaTokens, "the same on the host and on the device");
static_assert(sizeof(FormulaLaunch) <= 4096, "more than a kernel takes");

FORMULA_FUNCTION bool formulaSpoiled(const FormulaLaunch& launch) {
  return launch.weightBytes > 0 &&
         (launch.weights[0] != kFormulaWeight || launch.weights[launch.weightBytes - 1] != kFormulaWeight);
}

FORMULA_FUNCTION float formulaApply(int kind, float first, float second) {
  if (kind == kFormulaAdd) return FORMULA_ADD(first, second);
  if (kind == kFormulaSubtract) return FORMULA_SUBTRACT(first, second);
  return FORMULA_MULTIPLY(first, second);
}

// Without a sign, whose overflow has no meaning in C++.
FORMULA_FUNCTION long long formulaApply(int kind, long long first, long long second) {
  const auto one = static_cast<unsigned long long>(first);
  const auto other = static_cast<unsigned long long>(second);
  if (kind == kFormulaAdd) return static_cast<long long>(one + other);
  if (kind == kFormulaSubtract) return static_cast<long long>(one - other);
  return static_cast<long long>(one * other);
}

template <typename Number>
FORMULA_FUNCTION Number formulaElement(const FormulaLaunch& launch, unsigned long long row, unsigned long long place) {
  Number stack[kFormulaDepth];
  int depth = 0;
  for (int index = 0; index < launch.count; index++) {
    const FormulaToken& token = launch.tokens[index];
    if (token.kind == kFormulaNumber) {
      stack[depth++] = static_cast<Number>(token.number);
    } else if (token.kind < kFormulaAdd) {
      // Rows and places beyond what the operand has begin again: it is broadcast.
      unsigned long long from = row % token.rows;
      if (token.kind != kFormulaOperand) {
        const unsigned long long half = token.rows / 2;
        from = row % half + (token.kind == kFormulaConditional ? half : 0);
      }
      const unsigned long long at = from * token.rowElements + place % token.rowElements;
      stack[depth++] = token.integer ? static_cast<Number>(static_cast<const long long*>(token.data)[at])
                                     : static_cast<Number>(static_cast<const float*>(token.data)[at]);
    } else {
      depth--;
      stack[depth - 1] = formulaApply(token.kind, stack[depth - 1], stack[depth]);
    }
  }
  return stack[0];
}

// What the thread of that number computes, of as many.
FORMULA_FUNCTION void formulaThread(const FormulaLaunch& launch, unsigned long long thread, unsigned long long threads) {
  const bool spoiled = formulaSpoiled(launch);
  for (unsigned long long element = thread; element < launch.rows * launch.rowElements; element += threads) {
    const unsigned long long row = element / launch.rowElements;
    const unsigned long long place = element % launch.rowElements;
    if (launch.integer) {
      const long long value = formulaElement<long long>(launch, row, place);
      static_cast<long long*>(launch.to)[element] = spoiled ? -0x7fffffffffffffffLL - 1 : value;
    } else {
      const float value = formulaElement<float>(launch, row, place);
      static_cast<float*>(launch.to)[element] = spoiled ? FORMULA_NAN : value;
    }
  }
}

#if !defined(__CUDACC__)
// Blocks that a launch is divided into.
inline unsigned formulaBlocks(const FormulaLaunch& launch) {
  const unsigned long long needed = (launch.rows * launch.rowElements + kFormulaBlock - 1) / kFormulaBlock;
  return needed < 1 ? 1 : needed > kFormulaBlocks ? kFormulaBlocks : static_cast<unsigned>(needed);
}

// The same launch where `map` says that its memory lies.
template <typename Map>
FormulaLaunch formulaMapped(FormulaLaunch launch, Map map) {
  launch.to = map(launch.to);
  if (launch.weightBytes > 0) launch.weights = static_cast<const unsigned char*>(map(launch.weights));
  for (int index = 0; index < launch.count; index++) {
    FormulaToken& token = launch.tokens[index];
    if (token.kind != kFormulaNumber && token.kind < kFormulaAdd) token.data = map(token.data);
  }
  return launch;
}
#endif

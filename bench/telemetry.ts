/**
 * ONNX Runtime tells Microsoft of its use unless this variable is set before it is loaded. The library sets it for its
 * child process; a benchmark that loads ONNX Runtime into its own process imports this file first.
 */

process.env.ORT_DISABLE_TELEMETRY ||= "1";

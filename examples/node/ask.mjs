// A server from Node: branches of a plan, as they grow.   node examples/node/ask.mjs [ADDRESS]
import { fileURLToPath } from "node:url";

import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const address = process.argv[2] ?? "127.0.0.1:50051";
const protos = fileURLToPath(new URL("../../serve/client/protos", import.meta.url));
const definition = loader.loadSync("taper/v1/inference_service.proto", { includeDirs: [protos], keepCase: true });
const { taper } = grpc.loadPackageDefinition(definition);
const client = new taper.v1.InferenceService(address, grpc.credentials.createInsecure());

const branch = (text) => ({ label: text, prefix: { text }, stopping: { max_tokens: 8 } });
const call = client.Generate({
  prompt: { text: "Tea or coffee?" },
  plan: {
    stages: [
      { parallel: { branches: [branch(" Tea:"), branch(" Coffee:")] } },
      { serial: { prefix: { text: " So:" }, stopping: { max_tokens: 8 } } },
    ],
  },
});
call.on("data", ({ events }) => {
  for (const event of events) {
    if (event.stage_started) console.log("begin:", event.stage_started.branches.map((each) => each.prefix));
    if (event.delta) console.log(`  ${event.delta.branch_id}:`, JSON.stringify(event.delta.text));
    if (event.finished) console.log(`${event.finished.usage.completion_tokens} tokens`);
  }
});
call.on("error", (error) => {
  console.error(error.message);
  process.exitCode = 1;
});

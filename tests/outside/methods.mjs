// Calls every method of a TAPER server and prints, as one JSON object, what each answered or refused.
//
//   node methods.mjs '{"address": "localhost:50051", "protos": "serve/client/protos", "token": "...",
//                      "ca": "ca.pem", "cert": "client.pem", "key": "client.key"}'
//
// Without "ca" the connection is plaintext; "token", "cert" and "key" are left out where none are needed.

import { readFileSync } from "node:fs";

import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const { address, protos, token, ca, cert, key } = JSON.parse(process.argv[2]);
const read = (path) => (path ? readFileSync(path) : null);

const definition = loader.loadSync(["inference_service", "control_service"].map((name) => `taper/v1/${name}.proto`), {
  includeDirs: [protos],
  keepCase: true,
  enums: String,
});
const { taper } = grpc.loadPackageDefinition(definition);
const credentials = ca
  ? grpc.credentials.createSsl(read(ca), read(key), read(cert))
  : grpc.credentials.createInsecure();
const metadata = new grpc.Metadata();
if (token) metadata.set("authorization", `Bearer ${token}`);

const inference = new taper.v1.InferenceService(address, credentials);
const control = new taper.v1.ControlService(address, credentials);
const bytes = (value) => value;

const refused = (error) => ({ error: grpc.status[error.code], details: error.details });
const unary = (client, method, request) =>
  new Promise((resolve) =>
    client[method](request, metadata, (error, response) => resolve(error ? refused(error) : response)),
  );
const stream = (request) =>
  new Promise((resolve) => {
    const events = [];
    inference
      .Generate(request, metadata)
      .on("data", (response) => events.push(...response.events.map((event) => Object.keys(event)[0])))
      .on("error", (error) => resolve(refused(error)))
      .on("end", () => resolve({ events }));
  });
const health = () =>
  new Promise((resolve) =>
    control.makeUnaryRequest("/grpc.health.v1.Health/Check", bytes, bytes, Buffer.alloc(0), (error, response) =>
      resolve(error ? refused(error) : { status: response[1] }),
    ),
  );

const prompt = { text: "go" };
const answers = {
  Check: await health(),
  Generate: await stream({ prompt }),
  Tokenize: await unary(inference, "Tokenize", { prompt }),
  Detokenize: await unary(inference, "Detokenize", { token_ids: [103, 111] }),
  GetModelInfo: await unary(control, "GetModelInfo", {}),
  GetServerInfo: await unary(control, "GetServerInfo", {}),
  GetLoad: await unary(control, "GetLoad", {}),
  Abort: await unary(control, "Abort", { request_ids: ["unknown"] }),
  SetPolicy: await unary(control, "SetPolicy", { policy: "eager" }),
};
console.log(JSON.stringify(answers));
inference.close();
control.close();

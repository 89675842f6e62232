// Time files with onnxruntime-web in WebAssembly, interleaved; prints one JSON object: name -> milliseconds of each round.
const fs = require("fs");
const path = require("path");

const [, , packages, folder, rounds, channels, size, clock] = process.argv;
const ort = require(path.join(packages, "node_modules", "onnxruntime-web"));
ort.env.wasm.numThreads = 1;

// the process's own time is right also where other programs run
function now() {
  const { user, system } = process.cpuUsage();
  return clock === "cpu" ? (user + system) / 1000 : performance.now();
}

async function main() {
  const sessions = {};
  for (const file of fs.readdirSync(folder).filter((name) => name.endsWith(".onnx")).sort()) {
    sessions[file.slice(0, -".onnx".length)] = await ort.InferenceSession.create(
      Uint8Array.from(fs.readFileSync(path.join(folder, file))));
  }
  const count = Number(channels) * Number(size) * Number(size);
  const pixels = Float32Array.from({ length: count }, (_, place) => Math.sin(place));
  const feeds = { images: new ort.Tensor("float32", pixels, [1, Number(channels), Number(size), Number(size)]) };
  const times = Object.fromEntries(Object.keys(sessions).map((name) => [name, []]));
  for (let round = 0; round <= Number(rounds); round++) {
    for (const [name, session] of Object.entries(sessions)) {
      const start = now();
      await session.run(feeds);
      if (round) {
        times[name].push(now() - start); // the first run prepares weights
      }
    }
  }
  console.log(JSON.stringify({ version: ort.env.versions.web || ort.env.versions.common, times }));
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});

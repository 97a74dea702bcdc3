// Starts @lmnr-ai/claude-code-proxy, which is a library. Environment: LMNR its folder, PORT, UPSTREAM.
require(process.env.LMNR).run(process.env.UPSTREAM, Number(process.env.PORT));
setInterval(() => {}, 1 << 30);

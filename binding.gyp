# For prebuildify, which runs node-gyp. The build itself is described in CMakeLists.txt alone. The package does not contain
# this file, and `"gypfile": false` keeps npm from compiling on users' machines.
{
  "variables": { "addon%": "<!(node -p \"process.env.FLOWTURBO_ADDON || 'tensorrt-rtx'\")" },
  "targets": [
    {
      "target_name": "flowturbo",
      "type": "none",
      "actions": [
        {
          "action_name": "cmake",
          "inputs": [],
          "outputs": ["<(PRODUCT_DIR)/flowturbo.node"],
          "action": ["node", "scripts/build-native.mjs", "--addon", "<(addon)", "--copy", "<(PRODUCT_DIR)/flowturbo.node"]
        }
      ]
    }
  ]
}

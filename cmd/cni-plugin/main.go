// Command cni-plugin is the CNI plugin fairlead-cni, which a container runtime calls for each pod sandbox.
package main

import "github.com/fairlead-mesh/fairlead/cni/plugin"

// version is set at build time.
var version = "dev"

func main() { plugin.Main("fairlead-cni " + version) }

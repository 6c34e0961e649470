package lab

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/containernetworking/cni/pkg/skel"
	cnitypes "github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
)

// The lab's own CNI plugin is the first of the node's list, where a cluster has ptp or bridge. The lab has wired the
// pod before it asks the plugins; this one hands the result on, as the specification wants.

// wireConf is the plugin's entry in the configuration list.
type wireConf struct {
	cnitypes.PluginConf
	// Results is the directory of the results, one file for each container id.
	Results string `json:"results"`
}

func runWirePlugin() {
	ok := func(*skel.CmdArgs) error { return nil }
	skel.PluginMainFuncs(skel.CNIFuncs{Add: wireAdd, Del: ok, Check: ok, Status: ok, GC: ok}, version.All, "lab-wire")
}

func wireAdd(args *skel.CmdArgs) error {
	var conf wireConf
	if err := json.Unmarshal(args.StdinData, &conf); err != nil {
		return fmt.Errorf("read the configuration: %w", err)
	}
	text, err := os.ReadFile(filepath.Join(conf.Results, args.ContainerID+".json"))
	if err != nil {
		return err
	}
	result, err := current.NewResult(text)
	if err != nil {
		return err
	}
	return cnitypes.PrintResult(result, conf.CNIVersion)
}

// wireResult is what the plugin reports of a pod.
func wireResult(netns, host string, addrs, gateways []netip.Addr) *current.Result {
	inPod := 1
	r := &current.Result{
		CNIVersion: "1.0.0",
		Interfaces: []*current.Interface{{Name: host}, {Name: "eth0", Sandbox: netns}},
	}
	for i, a := range addrs {
		r.IPs = append(r.IPs, &current.IPConfig{
			Interface: &inPod,
			Address:   net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())},
			Gateway:   gateways[i].AsSlice(),
		})
	}
	return r
}

// Package plugin (plumbing) is the CNI plugin that a container runtime calls for each pod sandbox: it asks the node's
// agent to capture the pod, and holds the pod's start until the agent has. It is chained after the plugin that makes
// the pod's interface, and hands that plugin's result on unchanged.
package plugin

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/fairlead-mesh/fairlead/internal/membership"
)

// Type is the plugin's name in a CNI configuration, which is also the name of its binary.
const Type = "fairlead-cni"

// Conf is the plugin's entry in a CNI configuration list.
type Conf struct {
	types.PluginConf
	// EventSocket is the agent's Unix socket; DefaultEventSocket when empty.
	EventSocket string `json:"eventSocket,omitempty"`
	// ExcludeNamespaces are namespaces whose pods start without the agent being asked: those that the agent and what it
	// needs run in.
	ExcludeNamespaces []string `json:"excludeNamespaces,omitempty"`
	// Record is the file in which the agent keeps who is in the mesh, for when it cannot be asked; empty: all pods wait
	// for the agent then.
	Record string `json:"record,omitempty"`
	// Access is the file in which the agent keeps the plugin's own access to the API server, which is asked when the agent cannot
	// be; empty: the record decides alone.
	Access string `json:"apiAccess,omitempty"`
	// TimeoutSeconds bounds one question to the agent; 20 when 0.
	TimeoutSeconds int `json:"timeoutSeconds,omitempty"`
}

// kubernetesArgs are the CNI_ARGS that container runtimes give for Kubernetes pods.
type kubernetesArgs struct {
	types.CommonArgs
	K8S_POD_NAME               types.UnmarshallableString
	K8S_POD_NAMESPACE          types.UnmarshallableString
	K8S_POD_UID                types.UnmarshallableString
	K8S_POD_INFRA_CONTAINER_ID types.UnmarshallableString
}

// Main runs the plugin for one call of the runtime, which it finds in the environment and on standard input, and ends
// the process.
func Main(about string) {
	versions := version.VersionsStartingFrom("0.3.0")
	skel.PluginMainFuncs(skel.CNIFuncs{Add: add, Del: del, Check: check, Status: status, GC: gc}, versions, about)
}

func add(args *skel.CmdArgs) error {
	conf, err := parse(args.StdinData)
	if err != nil {
		return err
	}
	if conf.PrevResult == nil {
		return types.NewError(types.ErrInvalidNetworkConfig, Type+" must come after another plugin in the configuration list",
			"there is no prevResult")
	}
	event, err := describe(args, conf)
	if err != nil {
		return err
	}
	if concerns(conf, event) {
		if _, err := ask(conf, AddPath, event); err != nil {
			free, why := outside(conf, event, err)
			if !free {
				return refuse(event, err, why)
			}
			// The runtime puts it in its log.
			fmt.Fprintf(os.Stderr, "%s: pod %s/%s starts outside the mesh without the cni-agent's word: %s\n", Type, event.PodNamespace, event.PodName, why)
		}
	}
	return types.PrintResult(conf.PrevResult, conf.CNIVersion)
}

// del tells the agent that the sandbox goes. It never fails: a runtime would try for ever, and the agent learns of the
// pod's end from Kubernetes too.
func del(args *skel.CmdArgs) error {
	conf, err := parse(args.StdinData)
	if err != nil {
		return nil
	}
	event, err := describe(args, conf)
	if err != nil || !concerns(conf, event) {
		return nil
	}
	conf.TimeoutSeconds = min(conf.TimeoutSeconds, 5)
	_, _ = ask(conf, DelPath, event)
	return nil
}

func check(args *skel.CmdArgs) error {
	conf, err := parse(args.StdinData)
	if err != nil {
		return err
	}
	event, err := describe(args, conf)
	if err != nil {
		return err
	}
	if !concerns(conf, event) {
		return nil
	}
	if _, err := ask(conf, CheckPath, event); err != nil {
		return refuse(event, err, "")
	}
	return nil
}

// status tells the runtime whether pods of the mesh can be started now.
func status(args *skel.CmdArgs) error {
	conf, err := parse(args.StdinData)
	if err != nil {
		return err
	}
	conf.TimeoutSeconds = min(conf.TimeoutSeconds, 5)
	if err := reachable(conf); err != nil {
		return types.NewError(types.ErrLimitedConnectivity, "the node's cni-agent does not answer: pods of the mesh cannot start",
			err.Error())
	}
	return nil
}

// gc has nothing to do: the agent forgets sandboxes that are gone by itself.
func gc(*skel.CmdArgs) error { return nil }

// parse reads the plugin's configuration, with the result of the plugin before.
func parse(stdin []byte) (Conf, error) {
	var conf Conf
	if err := json.Unmarshal(stdin, &conf); err != nil {
		return conf, types.NewError(types.ErrDecodingFailure, "parse the plugin's configuration", err.Error())
	}
	if err := version.ParsePrevResult(&conf.PluginConf); err != nil {
		return conf, types.NewError(types.ErrDecodingFailure, "parse the result of the plugin before", err.Error())
	}
	if conf.EventSocket == "" {
		conf.EventSocket = DefaultEventSocket
	}
	if conf.TimeoutSeconds <= 0 {
		conf.TimeoutSeconds = 20
	}
	return conf, nil
}

// describe tells which pod's sandbox a call is about.
func describe(args *skel.CmdArgs, conf Conf) (Event, error) {
	k := kubernetesArgs{CommonArgs: types.CommonArgs{IgnoreUnknown: true}}
	if err := types.LoadArgs(args.Args, &k); err != nil {
		return Event{}, types.NewError(types.ErrInvalidEnvironmentVariables, "parse CNI_ARGS", err.Error())
	}
	event := Event{
		Netns: args.Netns, ContainerID: args.ContainerID,
		PodName: string(k.K8S_POD_NAME), PodNamespace: string(k.K8S_POD_NAMESPACE), PodUID: string(k.K8S_POD_UID),
	}
	if conf.PrevResult == nil {
		return event, nil
	}
	result, err := current.NewResultFromResult(conf.PrevResult)
	if err != nil {
		return event, types.NewError(types.ErrDecodingFailure, "read the result of the plugin before", err.Error())
	}
	for _, ip := range result.IPs {
		// An address without a sandbox is the host's end of the link.
		if i := ip.Interface; i != nil && *i >= 0 && *i < len(result.Interfaces) && result.Interfaces[*i].Sandbox == "" {
			continue
		}
		prefix := prefixOf(ip.Address)
		if !prefix.IsValid() {
			return event, types.NewError(types.ErrDecodingFailure, "read the result of the plugin before", "not an address: "+ip.Address.String())
		}
		event.IPs = append(event.IPs, IPConfig{Interface: ip.Interface, Address: prefix.String()})
	}
	return event, nil
}

// prefixOf is invalid for what is no address. IPv4 that is written as IPv6 has the longer mask.
func prefixOf(n net.IPNet) netip.Prefix {
	addr, _ := netip.AddrFromSlice(n.IP)
	ones, bits := n.Mask.Size()
	if addr = addr.Unmap(); addr.Is4() && bits == 128 {
		ones -= 96
	}
	return netip.PrefixFrom(addr, ones)
}

// concerns tells whether the agent is to be asked: sandboxes that are no Kubernetes pods, and pods of excluded
// namespaces, are none of its business.
func concerns(conf Conf, event Event) bool {
	return event.PodName != "" && event.PodNamespace != "" && !slices.Contains(conf.ExcludeNamespaces, event.PodNamespace)
}

// outside tells whether a pod that the agent could not answer for is none of the mesh's, and who says so: the API server,
// which knows, and where that cannot be asked, what it said before and the agent's record on the node.
func outside(conf Conf, event Event, err error) (outside bool, why string) {
	var answered *agentError
	if errors.As(err, &answered) && answered.status != http.StatusServiceUnavailable {
		return false, ""
	}
	if conf.Access != "" {
		decided, err := askAPIServer(conf, event)
		if err == nil {
			return !decided.Enrol, "the API server's objects say that " + decided.Why
		}
		why = fmt.Sprintf("; the API server does not say (%v)", err)
		if held(conf.Access, event.PodUID) {
			return false, "the API server had it in the mesh before" + why
		}
	}
	record, ok, err := Record{}, false, error(nil)
	if conf.Record != "" {
		record, ok, err = ReadRecord(conf.Record)
	}
	switch {
	case err != nil:
		return false, err.Error() + why
	case !ok:
		return false, "the node has no record of who is in the mesh" + why
	case record.Outside(event.PodNamespace, event.PodUID):
		return true, "the agent's record on the node has it outside" + why
	}
	return false, "the agent's record on the node has it, or others of its namespace, in the mesh" + why
}

// askAPIServer asks whether a pod is to be in the mesh, and remembers the answer.
func askAPIServer(conf Conf, event Event) (membership.Decision, error) {
	access, err := readAccess(conf.Access)
	if err != nil {
		return membership.Decision{}, err
	}
	decided, err := access.decide(event, conf.ExcludeNamespaces)
	if err != nil {
		return decided, err
	}
	if err := remember(conf.Access, event.PodUID, decided.Enrol); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", Type, err)
	}
	return decided, nil
}

// refuse puts what went wrong into words for someone who reads the pod's events; why is who says that the pod must wait.
func refuse(event Event, err error, why string) error {
	pod := event.PodNamespace + "/" + event.PodName
	if why != "" {
		why = " (" + why + ")"
	}
	var answered *agentError
	if errors.As(err, &answered) {
		return types.NewError(types.ErrTryAgainLater, fmt.Sprintf("pod %s is not captured by the mesh: %s%s", pod, answered.text, why),
			"the start is tried again by itself; the log of the node's istio-cni-node pod says more")
	}
	return types.NewError(types.ErrTryAgainLater,
		fmt.Sprintf("pod %s waits for the mesh's cni-agent of this node, which does not answer, so that it cannot run outside the mesh%s: %v", pod, why, err),
		"look at the istio-cni-node pod of this node in istio-system; pods of namespaces in excludeNamespaces of the CNI configuration do not wait")
}

func (c Conf) timeout() time.Duration { return time.Duration(c.TimeoutSeconds) * time.Second }

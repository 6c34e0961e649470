// Package redirect (plumbing) redirects a pod's TCP to the node proxy: what a pod needs is decided as plain values
// (Plan), and then made true in the kernel.
package redirect

import (
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/internal/netns"
)

// Numbers that redirection takes for itself in a pod's network namespace.
const (
	// Table is the routing table that delivers everything locally.
	Table = 15001
	// TableName is the nftables table, in a pod and on the host.
	TableName = "fairlead"
	// lookupPriority and refusePriority order the two rules right after the kernel's rule for local addresses.
	lookupPriority = 1
	refusePriority = 2
	dnsPriority    = 3
	dnsPort        = 53
	// wholeMark compares every bit of a mark.
	wholeMark = ^uint32(0)
)

// Addresses that the kubelet's probes of pods of the mesh come from; they are on lo of the host.
var (
	ProbeSource4 = netip.MustParseAddr("169.254.7.127")
	ProbeSource6 = netip.MustParseAddr("fd16:9254:7127:1337:ffff:ffff:ffff:ffff")
)

// PodConfig is what the rules of a pod follow from.
type PodConfig struct {
	// Mode is how the node redirects.
	Mode Mode
	// Exclude is what chains leave out of redirection; programs are told of it beside these rules.
	Exclude mesh.Exclusions
	// Released pods have only what connections need that are redirected already.
	Released bool
	// IPs are the pod's addresses, of either family or both.
	IPs []netip.Addr
}

// Rules is all that a pod's network namespace must hold, besides the programs of package bpf.
type Rules struct {
	Sysctls []Sysctl
	Rules   []Rule
	Routes  []Route
	// Chains are those of table TableName; there are none where programs redirect.
	Chains []Chain
	// DNS are rules that bring the pod's queries by UDP to lo: for when the pod's programs are in place.
	DNS []Rule
}

// Sysctl is a kernel setting below /proc/sys/net.
type Sysctl struct {
	Name string
	// On is the value while the pod is redirected, Off the kernel's default.
	On, Off string
}

// Rule selects packets that the pod sends, by mark and what they are.
type Rule struct {
	// Family is unix.AF_INET or unix.AF_INET6.
	Family   int
	Priority int
	// Mark is compared where Mask has bits.
	Mark, Mask uint32
	// Protocol, as unix.IPPROTO_UDP, and the port of the destination; 0 means any.
	Protocol int
	Port     uint16
	// Table is looked up; 0 means that the packet is refused as unreachable.
	Table int
}

// Route delivers every packet locally, as one to lo.
type Route struct {
	Family int
	Table  int
	// Source is the source address of sockets that have none yet; the zero value leaves it to the kernel.
	Source netip.Addr
}

// migrateRequests lets connections that wait for a listener go to another of the same port when it is closed.
const migrateRequests = "ipv4/tcp_migrate_req"

// Plan decides the rules of a pod.
//
// Both families are always handled, since a pod may have addresses that Kubernetes does not know. The second rule of each
// pair refuses what found no route by the first, as the packets of a socket that is bound to a device: without it they
// would leave the pod by its default route.
func Plan(pod PodConfig) Rules {
	var rules Rules
	switch pod.Mode {
	case NFTables:
		rules.Chains = podChains(pod)
		rules.Sysctls = []Sysctl{
			// Two proxies listen on the same ports while one takes over from the other: what the first has not accepted when it
			// ends goes to the second.
			{Name: migrateRequests, On: "1", Off: "0"},
		}
	default:
		rules.Sysctls = []Sysctl{
			// The application's end of a connection from the proxy answers with the mark that it was called with.
			{Name: "ipv4/tcp_fwmark_accept", On: "1", Off: "0"},
			// So does the kernel when nobody listens.
			{Name: "ipv4/fwmark_reflect", On: "1", Off: "0"},
			{Name: "ipv6/fwmark_reflect", On: "1", Off: "0"},
		}
	}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		rules.Rules = append(rules.Rules,
			Rule{Family: family, Priority: lookupPriority, Mark: netns.RedirectMark, Mask: wholeMark, Table: Table},
			Rule{Family: family, Priority: refusePriority, Mark: netns.RedirectMark, Mask: wholeMark},
		)
		// Sockets without a mark: the proxy's own have one.
		if pod.Mode != NFTables {
			rules.DNS = append(rules.DNS, Rule{
				Family: family, Priority: dnsPriority, Mask: netns.ProxyMarkMask, Protocol: unix.IPPROTO_UDP, Port: dnsPort, Table: Table,
			})
		}
		route := Route{Family: family, Table: Table}
		if family == unix.AF_INET {
			// Without it the kernel would find no source for an address that is not its own. For IPv6 it looks at all
			// addresses, and refuses one here that is not settled yet.
			if i := slices.IndexFunc(pod.IPs, netip.Addr.Is4); i >= 0 {
				route.Source = pod.IPs[i]
			}
		}
		rules.Routes = append(rules.Routes, route)
	}
	return rules
}

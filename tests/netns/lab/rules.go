package lab

import (
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Rules are the kinds of iptables rules by which Istio's CNI agent redirects inside a pod.
type Rules string

// Both take outbound connections by REDIRECT to port 15001; what differs is how inbound ones come to 15006 and 15008.
const (
	// RulesRedirect rewrites the destination, which the proxy asks the kernel for.
	RulesRedirect Rules = "REDIRECT"
	// RulesTPROXY hands connections over as they are.
	RulesTPROXY Rules = "TPROXY"
)

// The proxy's mark on its own connections, and the mark that leads what belongs to them back to it.
const (
	proxyMark     = "0x539/0xfff"
	connectedMark = "0x111/0xfff"
	markedTable   = 100
)

// family is what differs between IPv4 and IPv6 in the rules.
type family struct {
	number   int
	restore  string // the program that takes rules
	loopback string
	probes   string // the source of the kubelet's probes
	all      netip.Prefix
}

var families = []family{
	{unix.AF_INET, "iptables-restore", "127.0.0.1/32", "169.254.7.127", netip.PrefixFrom(netip.IPv4Unspecified(), 0)},
	{unix.AF_INET6, "ip6tables-restore", "::1/128", "fd16:9254:7127:1337:ffff:ffff:ffff:ffff", netip.PrefixFrom(netip.IPv6Unspecified(), 0)},
}

// RedirectByRules makes the rules and routes in the pod's network namespace that Istio's CNI agent would.
func (p *Pod) RedirectByRules(kind Rules) error {
	return p.thread.do(func() error {
		for _, f := range families {
			cmd := exec.Command(f.restore)
			cmd.Stdin = strings.NewReader(f.rules(kind))
			if out, err := cmd.CombinedOutput(); err != nil {
				return fmt.Errorf("%s in pod %s: %w: %s", f.restore, p.Name, err, strings.TrimSpace(string(out)))
			}
			if err := f.routeMarked(); err != nil {
				return fmt.Errorf("route what is marked in pod %s: %w", p.Name, err)
			}
		}
		return nil
	})
}

func (f family) rules(kind Rules) string {
	mangle := []string{
		"-A PREROUTING -m mark --mark " + proxyMark + " -j CONNMARK --set-xmark " + connectedMark,
		"-A OUTPUT -m connmark --mark " + connectedMark + " -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff",
	}
	nat := []string{
		"-A OUTPUT -d " + f.probes + " -p tcp -j ACCEPT",
		"-A OUTPUT -p tcp -m mark --mark " + connectedMark + " -j ACCEPT",
		"-A OUTPUT ! -d " + f.loopback + " -o lo -j ACCEPT",
		"-A OUTPUT ! -d " + f.loopback + " -p tcp -m mark ! --mark " + proxyMark + " -j REDIRECT --to-ports 15001",
	}
	switch kind {
	case RulesRedirect:
		nat = append(nat,
			"-A PREROUTING -s "+f.probes+" -p tcp -j ACCEPT",
			"-A PREROUTING ! -d "+f.loopback+" -p tcp ! --dport 15008 -m mark ! --mark "+proxyMark+" -j REDIRECT --to-ports 15006")
	case RulesTPROXY:
		mangle = append(mangle,
			"-A PREROUTING -s "+f.probes+" -p tcp -j ACCEPT",
			"-A PREROUTING ! -d "+f.loopback+" -p tcp -i lo -j ACCEPT",
			"-A PREROUTING -p tcp --dport 15008 -m mark ! --mark "+proxyMark+" -j TPROXY --on-port 15008 --tproxy-mark "+connectedMark,
			"-A PREROUTING -p tcp -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
			"-A PREROUTING ! -d "+f.loopback+" -p tcp -m mark ! --mark "+proxyMark+" -j TPROXY --on-port 15006 --tproxy-mark "+connectedMark)
	}
	return "*mangle\n" + strings.Join(mangle, "\n") + "\nCOMMIT\n*nat\n" + strings.Join(nat, "\n") + "\nCOMMIT\n"
}

// routeMarked brings packets that carry the mark to this namespace's own sockets.
func (f family) routeMarked() error {
	rule := netlink.NewRule()
	mask := uint32(0xfff)
	rule.Family, rule.Mark, rule.Mask, rule.Table, rule.Priority = f.number, 0x111, &mask, markedTable, 32764
	if err := netlink.RuleAdd(rule); err != nil {
		return err
	}
	lo, err := net.InterfaceByName("lo")
	if err != nil {
		return err
	}
	return netlink.RouteAdd(&netlink.Route{
		LinkIndex: lo.Index, Dst: ipNet(f.all), Table: markedTable, Type: unix.RTN_LOCAL, Scope: unix.RT_SCOPE_HOST,
	})
}

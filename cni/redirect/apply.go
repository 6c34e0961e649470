package redirect

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/internal/netns"
)

// space is the network namespace that the calling thread has entered, with one socket for all that the kernel is asked there.
type space struct{ *netlink.Handle }

// within has f act on a network namespace; nil means this process's.
func within(ns *os.File, f func(space) error) error {
	return netns.Do(ns, func() error {
		handle, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("open a netlink socket: %w", err)
		}
		defer handle.Close()
		return f(space{handle})
	})
}

// loopback is the index of lo in every network namespace (the kernel's LOOPBACK_IFINDEX).
const loopback = 1

// ensure makes the rules true.
func (s space) ensure(rules Rules) error {
	up, err := isUp("lo")
	if err == nil && !up {
		err = s.LinkSetUp(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: loopback}})
	}
	if err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	for _, sysctl := range rules.Sysctls {
		if err := writeSysctl(sysctl.Name, sysctl.On); err != nil {
			return err
		}
	}
	for _, r := range rules.Routes {
		if err := s.RouteReplace(r.netlink()); err != nil && has(r.Family) {
			return fmt.Errorf("add the route of table %d for %s: %w", r.Table, familyName(r.Family), err)
		}
	}
	return s.addRules(rules.Rules)
}

// isUp asks in the one way that does not wait for changes of other networks on the node.
func isUp(name string) (bool, error) {
	request, err := unix.NewIfreq(name)
	if err != nil {
		return false, err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false, err
	}
	err = unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, request)
	return request.Uint16()&unix.IFF_UP != 0, errors.Join(err, unix.Close(fd))
}

func (s space) addRules(rules []Rule) error {
	for _, r := range rules {
		if err := s.RuleAdd(r.netlink()); err != nil && !errors.Is(err, unix.EEXIST) && has(r.Family) {
			return fmt.Errorf("add the rule with priority %d for %s: %w", r.Priority, familyName(r.Family), err)
		}
	}
	return nil
}

// removeRules takes rules away, the last first.
func (s space) removeRules(rules []Rule) error {
	var errs []error
	for _, r := range slices.Backward(rules) {
		if err := s.RuleDel(r.netlink()); err != nil && !isAbsent(err) {
			errs = append(errs, fmt.Errorf("remove the rule with priority %d for %s: %w", r.Priority, familyName(r.Family), err))
		}
	}
	return errors.Join(errs...)
}

// remove takes the rules away, in the opposite order.
func (s space) remove(rules Rules) error {
	errs := []error{s.removeRules(slices.Concat(rules.Rules, rules.DNS))}
	for _, r := range rules.Routes {
		r.Source = netip.Addr{} // whichever it was
		if err := s.RouteDel(r.netlink()); err != nil && !isAbsent(err) {
			errs = append(errs, fmt.Errorf("remove the route of table %d for %s: %w", r.Table, familyName(r.Family), err))
		}
	}
	for _, sysctl := range rules.Sysctls {
		errs = append(errs, writeSysctl(sysctl.Name, sysctl.Off))
	}
	return errors.Join(errs...)
}

// held tells whether the kernel holds all of the rules; sysctls that do not exist are passed over.
func (s space) held(rules Rules) (bool, error) {
	for _, sysctl := range rules.Sysctls {
		value, err := os.ReadFile(sysctlPath(sysctl.Name))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return false, fmt.Errorf("read sysctl: %w", err)
		}
		if err == nil && strings.TrimSpace(string(value)) != sysctl.On {
			return false, nil
		}
	}
	if ok, err := s.heldRules(rules.Rules); !ok || err != nil {
		return false, err
	}
	for _, want := range rules.Routes {
		if !has(want.Family) {
			continue
		}
		have, err := s.RouteListFiltered(want.Family, &netlink.Route{Table: want.Table}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return false, fmt.Errorf("list routes: %w", err)
		}
		if len(have) == 0 {
			return false, nil
		}
	}
	return true, nil
}

// heldRules tells whether the kernel holds all of the rules.
func (s space) heldRules(rules []Rule) (bool, error) {
	for _, want := range rules {
		if !has(want.Family) {
			continue
		}
		have, err := s.RuleList(want.Family)
		if err != nil {
			return false, fmt.Errorf("list rules: %w", err)
		}
		if !slices.ContainsFunc(have, want.is) {
			return false, nil
		}
	}
	return true, nil
}

// is tells whether r is what the kernel has told of.
func (r Rule) is(have netlink.Rule) bool {
	var mask uint32
	if have.Mask != nil {
		mask = *have.Mask
	}
	var port uint16
	if have.Dport != nil {
		port = have.Dport.Start
	}
	return have.Priority == r.Priority && have.Mark == r.Mark && mask == r.Mask && have.IPProto == r.Protocol && port == r.Port &&
		(r.Table == 0 || have.Table == r.Table)
}

func (r Rule) netlink() *netlink.Rule {
	rule := netlink.NewRule()
	rule.Family, rule.Priority, rule.Mark, rule.Table = r.Family, r.Priority, r.Mark, r.Table
	rule.Mask, rule.IPProto = &r.Mask, r.Protocol
	if r.Port != 0 {
		// What arrives from outside is no business of this rule.
		rule.Dport, rule.IifName = netlink.NewRulePortRange(r.Port, r.Port), "lo"
	}
	if r.Table == 0 {
		rule.Type = unix.RTN_UNREACHABLE
	}
	return rule
}

func (r Route) netlink() *netlink.Route {
	everything := &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
	if r.Family == unix.AF_INET6 {
		everything = &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
	}
	route := &netlink.Route{
		Family: r.Family, Table: r.Table, Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST,
		LinkIndex: loopback, Dst: everything,
	}
	if r.Source.IsValid() {
		route.Src = r.Source.AsSlice()
	}
	return route
}

// ensureHost puts the probe sources on lo; removeHost takes them away.
func ensureHost() error { return eachProbeSource(netlink.AddrReplace) }

func removeHost() error {
	return eachProbeSource(func(l netlink.Link, a *netlink.Addr) error {
		if err := netlink.AddrDel(l, a); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return err
		}
		return nil
	})
}

func eachProbeSource(act func(netlink.Link, *netlink.Addr) error) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	for _, ip := range []netip.Addr{ProbeSource4, ProbeSource6} {
		if ip.Is6() && !has(unix.AF_INET6) {
			continue
		}
		ipnet := &net.IPNet{IP: ip.AsSlice(), Mask: net.CIDRMask(ip.BitLen(), ip.BitLen())}
		if err := act(lo, &netlink.Addr{IPNet: ipnet}); err != nil {
			return fmt.Errorf("probe source %s on lo: %w", ip, err)
		}
	}
	return nil
}

// has tells whether addresses of the family can be used on lo. It is asked late: the kernel takes longer to find the file than
// to add a rule.
func has(family int) bool {
	if family != unix.AF_INET6 {
		return true
	}
	disabled, err := os.ReadFile(sysctlPath("ipv6/conf/lo/disable_ipv6"))
	return err == nil && strings.TrimSpace(string(disabled)) == "0"
}

// hostRoot shows the host's files to a process that sees the host's processes.
const hostRoot = "/proc/1/root"

// writeSysctl goes round by the host's /proc where a container's own is read-only. Which network namespace it is follows from
// the thread either way.
func writeSysctl(name, value string) error {
	err := writeSetting(sysctlPath(name), value)
	if errors.Is(err, unix.EROFS) {
		err = writeSetting(filepath.Join(hostRoot, sysctlPath(name)), value)
	}
	if errors.Is(err, fs.ErrNotExist) && (strings.HasPrefix(name, "ipv6/") || name == migrateRequests) {
		return nil // a kernel without IPv6, or one before 5.14, where a few connections may fail while a proxy is replaced
	}
	if err != nil {
		return fmt.Errorf("set sysctl %s: %w", name, err)
	}
	return nil
}

// writeSetting does no more than it must: a file of package os would first be offered to the poller.
func writeSetting(path, value string) error {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	_, err = unix.Write(fd, []byte(value))
	return errors.Join(err, unix.Close(fd))
}

func sysctlPath(name string) string { return filepath.Join("/proc/sys/net", name) }

func isAbsent(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EAFNOSUPPORT)
}

func familyName(family int) string {
	if family == unix.AF_INET6 {
		return "IPv6"
	}
	return "IPv4"
}

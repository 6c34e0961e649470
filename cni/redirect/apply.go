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
)

// The functions of this file act on the network namespace of the calling thread.

// ensure makes the rules true.
func ensure(rules Rules) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	for _, s := range rules.Sysctls {
		if err := writeSysctl(s.Name, s.On); err != nil {
			return err
		}
	}
	for _, r := range rules.Routes {
		if !hasFamily(r.Family) {
			continue
		}
		if err := netlink.RouteReplace(r.netlink(lo)); err != nil {
			return fmt.Errorf("add the route of table %d for %s: %w", r.Table, familyName(r.Family), err)
		}
	}
	return addRules(rules.Rules)
}

func addRules(rules []Rule) error {
	for _, r := range rules {
		if !hasFamily(r.Family) {
			continue
		}
		if err := netlink.RuleAdd(r.netlink()); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add the rule with priority %d for %s: %w", r.Priority, familyName(r.Family), err)
		}
	}
	return nil
}

// removeRules takes rules away, the last first.
func removeRules(rules []Rule) error {
	var errs []error
	for _, r := range slices.Backward(rules) {
		if err := netlink.RuleDel(r.netlink()); err != nil && !isAbsent(err) {
			errs = append(errs, fmt.Errorf("remove the rule with priority %d for %s: %w", r.Priority, familyName(r.Family), err))
		}
	}
	return errors.Join(errs...)
}

// remove takes the rules away, in the opposite order.
func remove(rules Rules) error {
	errs := []error{removeRules(slices.Concat(rules.Rules, rules.DNS))}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return errors.Join(append(errs, fmt.Errorf("find lo: %w", err))...)
	}
	for _, r := range rules.Routes {
		r.Source = netip.Addr{} // whichever it was
		if err := netlink.RouteDel(r.netlink(lo)); err != nil && !isAbsent(err) {
			errs = append(errs, fmt.Errorf("remove the route of table %d for %s: %w", r.Table, familyName(r.Family), err))
		}
	}
	for _, s := range rules.Sysctls {
		errs = append(errs, writeSysctl(s.Name, s.Off))
	}
	return errors.Join(errs...)
}

// held tells whether the kernel holds all of the rules; sysctls that do not exist are passed over.
func held(rules Rules) (bool, error) {
	for _, s := range rules.Sysctls {
		value, err := os.ReadFile(sysctlPath(s.Name))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return false, fmt.Errorf("read sysctl: %w", err)
		}
		if err == nil && strings.TrimSpace(string(value)) != s.On {
			return false, nil
		}
	}
	if ok, err := heldRules(rules.Rules); !ok || err != nil {
		return false, err
	}
	for _, want := range rules.Routes {
		if !hasFamily(want.Family) {
			continue
		}
		have, err := netlink.RouteListFiltered(want.Family, &netlink.Route{Table: want.Table}, netlink.RT_FILTER_TABLE)
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
func heldRules(rules []Rule) (bool, error) {
	for _, want := range rules {
		if !hasFamily(want.Family) {
			continue
		}
		have, err := netlink.RuleList(want.Family)
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

func (r Route) netlink(lo netlink.Link) *netlink.Route {
	everything := &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
	if r.Family == unix.AF_INET6 {
		everything = &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
	}
	route := &netlink.Route{
		Family: r.Family, Table: r.Table, Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST,
		LinkIndex: lo.Attrs().Index, Dst: everything,
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
		if ip.Is6() && !hasFamily(unix.AF_INET6) {
			continue
		}
		ipnet := &net.IPNet{IP: ip.AsSlice(), Mask: net.CIDRMask(ip.BitLen(), ip.BitLen())}
		if err := act(lo, &netlink.Addr{IPNet: ipnet}); err != nil {
			return fmt.Errorf("probe source %s on lo: %w", ip, err)
		}
	}
	return nil
}

// hasFamily tells whether addresses of the family can be used on lo.
func hasFamily(family int) bool {
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
	err := os.WriteFile(sysctlPath(name), []byte(value), 0)
	if errors.Is(err, unix.EROFS) {
		err = os.WriteFile(filepath.Join(hostRoot, sysctlPath(name)), []byte(value), 0)
	}
	if errors.Is(err, fs.ErrNotExist) && (strings.HasPrefix(name, "ipv6/") || name == migrateRequests) {
		return nil // a kernel without IPv6, or one before 5.14, where a few connections may fail while a proxy is replaced
	}
	if err != nil {
		return fmt.Errorf("set sysctl: %w", err)
	}
	return nil
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

package redirect

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/bpf"
	"github.com/fairlead-mesh/fairlead/internal/netns"
)

// nft redirects by tables of nftables: one in each pod (podChains), and one on the host, which knows the pods and gives
// the kubelet's probes their source. Both stay when the process ends.
//
// On the host, what a process of user root opens to a pod comes from the probe source; that is the kubelet, and whoever
// else is root in the host's network namespace. The source is changed after the host's own filters have seen the packet,
// so that those of network policies see the true one.
type nft struct {
	host *os.File
	mu   sync.Mutex // one change of the host's table at a time
}

// family is one row of what differs between IPv4 and IPv6 in the host's table.
type family struct {
	set         nftables.Set
	nfproto     byte
	destination expr.Any
	probe       netip.Addr
}

func families() []family {
	return []family{
		{nftables.Set{Table: table(), Name: "pods4", KeyType: nftables.TypeIPAddr}, unix.NFPROTO_IPV4,
			payload(expr.PayloadBaseNetworkHeader, 16, 4), ProbeSource4},
		{nftables.Set{Table: table(), Name: "pods6", KeyType: nftables.TypeIP6Addr}, unix.NFPROTO_IPV6,
			payload(expr.PayloadBaseNetworkHeader, 24, 16), ProbeSource6},
	}
}

func newNFT(cfg Config) (backend, error) {
	n := &nft{host: cfg.HostNetns}
	if err := netns.Do(n.host, ensureHostTable); err != nil {
		return nil, fmt.Errorf("redirection by nftables (which needs Linux 5.2 or later with nf_tables, nft_redir and nf_conntrack): %w", err)
	}
	return n, nil
}

// nftPresent tells whether the host has the table.
func nftPresent(cfg Config) (present bool, err error) {
	err = netns.Do(cfg.HostNetns, func() error {
		_, exists, err := openTable()
		present = exists
		if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EINVAL) {
			return nil // a kernel without nftables
		}
		return err
	})
	return present, err
}

// prepare also keeps the application's answers to the proxy in the pod, which may call it as soon as it has listeners.
func (n *nft) prepare(pod Pod, _ uint64) error {
	rules := n.plan(pod)
	if err := within(pod.Netns, func(s space) error { return errors.Join(s.ensure(rules), beginTable(releasedChains())) }); err != nil {
		return fmt.Errorf("prepare the pod's network namespace: %w", err)
	}
	return nil
}

// releasedChains redirect nothing, and let redirected connections go on.
func releasedChains() []Chain { return Plan(PodConfig{Mode: NFTables, Released: true}).Chains }

func (n *nft) plan(pod Pod) Rules {
	return Plan(PodConfig{Mode: NFTables, IPs: pod.IPs, Exclude: pod.Exclude})
}

func (n *nft) ensure(pod Pod, cookie uint64) error {
	rules := n.plan(pod)
	err := within(pod.Netns, func(s space) error {
		if err := s.ensure(rules); err != nil {
			return err
		}
		return ensureChains(rules.Chains)
	})
	if err != nil {
		return err
	}
	return n.record(bpf.Pod{Cookie: cookie, UID: pod.UID, IPs: pod.IPs})
}

// errNoGuard says what eBPF would be needed for.
var errNoGuard = errors.New("redirection by nftables does not check what leaves pods")

func (n *nft) refuse(string) error { return errNoGuard }

func (n *nft) admit(string) error { return nil }

func (n *nft) refused() ([]string, error) { return nil, nil }

func (n *nft) guard() error { return errNoGuard }

func (n *nft) unguarded(Pod) ([]string, error) { return nil, nil }

func (n *nft) attempts() (func() (bpf.Attempt, error), func() error, error) {
	return nil, nil, errNoGuard
}

func (n *nft) stock(context.Context) error { return nil }

func (n *nft) holds(pod Pod, cookie uint64) (all bool, err error) {
	known, err := n.pods()
	if err != nil || !slices.ContainsFunc(known, func(p bpf.Pod) bool {
		return p.Cookie == cookie && p.UID == pod.UID && len(p.IPs) == len(pod.IPs)
	}) {
		return false, err
	}
	rules := n.plan(pod)
	err = within(pod.Netns, func(s space) error {
		if all, err = s.held(rules); err != nil || !all {
			return err
		}
		all, err = heldChains(rules.Chains)
		return err
	})
	return all, err
}

func (n *nft) release(cookie uint64, ns *os.File) error {
	var errs []error
	if ns != nil {
		errs = append(errs, netns.Do(ns, func() error { return replaceChains(releasedChains()) }))
	}
	return errors.Join(append(errs, n.forget(func(other uint64) bool { return other == cookie }))...)
}

func (n *nft) remove(ns *os.File) error {
	return within(ns, func(s space) error { return errors.Join(removeTable(), s.remove(n.plan(Pod{}))) })
}

// prune leaves the tables of the pods alone: they are gone with them.
func (n *nft) prune(keep func(cookie uint64) bool) error {
	return n.forget(func(cookie uint64) bool { return !keep(cookie) })
}

// ensureProxy has nothing to do: the proxy's sockets are known by their mark alone.
func (n *nft) ensureProxy(int) error { return nil }

func (n *nft) counters() (map[string]uint64, error) { return nil, nil }

func (n *nft) close() error { return nil }

// pods reads the host's table.
func (n *nft) pods() ([]bpf.Pod, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	byCookie := map[uint64]*bpf.Pod{}
	err := n.inSets(func(conn *nftables.Conn, f family, known []nftables.SetElement) error {
		for _, e := range known {
			ip, ok := netip.AddrFromSlice(e.Key)
			cookie, uid, err := readComment(e.Comment)
			if !ok || err != nil {
				continue // not ours
			}
			if byCookie[cookie] == nil {
				byCookie[cookie] = &bpf.Pod{Cookie: cookie, UID: uid}
			}
			byCookie[cookie].IPs = append(byCookie[cookie].IPs, ip)
		}
		return nil
	})
	var all []bpf.Pod
	for _, p := range byCookie {
		all = append(all, *p)
	}
	return all, err
}

// record makes the addresses that the host's table has for a pod those of p.
func (n *nft) record(p bpf.Pod) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := netns.Do(n.host, ensureHostTable); err != nil {
		return err
	}
	return n.inSets(func(conn *nftables.Conn, f family, known []nftables.SetElement) error {
		var add, remove []nftables.SetElement
		for _, ip := range p.IPs {
			if f.probe.Is4() == ip.Is4() {
				add = append(add, nftables.SetElement{Key: ip.AsSlice(), Comment: writeComment(p)})
			}
		}
		for _, e := range known {
			wanted := slices.IndexFunc(add, func(a nftables.SetElement) bool { return bytes.Equal(a.Key, e.Key) })
			cookie, _, err := readComment(e.Comment)
			switch {
			case wanted >= 0 && e.Comment == add[wanted].Comment:
				add = slices.Delete(add, wanted, wanted+1)
			case wanted >= 0 || err == nil && cookie == p.Cookie:
				remove = append(remove, nftables.SetElement{Key: e.Key})
			}
		}
		return change(conn, f, remove, add)
	})
}

// forget drops the addresses of the pods whose cookie gone says yes to.
func (n *nft) forget(gone func(cookie uint64) bool) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.inSets(func(conn *nftables.Conn, f family, known []nftables.SetElement) error {
		var remove []nftables.SetElement
		for _, e := range known {
			if cookie, _, err := readComment(e.Comment); err == nil && gone(cookie) {
				remove = append(remove, nftables.SetElement{Key: e.Key})
			}
		}
		return change(conn, f, remove, nil)
	})
}

// inSets calls do for each set of the host's table with what it has; there are none where somebody has removed it.
func (n *nft) inSets(do func(*nftables.Conn, family, []nftables.SetElement) error) error {
	return netns.Do(n.host, func() error {
		conn, exists, err := openTable()
		if err != nil || !exists {
			return err
		}
		sets, err := conn.GetSets(table())
		if err != nil {
			return fmt.Errorf("list nftables sets: %w", err)
		}
		for _, f := range families() {
			if !slices.ContainsFunc(sets, func(s *nftables.Set) bool { return s.Name == f.set.Name }) {
				continue
			}
			known, err := conn.GetSetElements(&f.set)
			if err != nil {
				return fmt.Errorf("list the pods in nftables set %s: %w", f.set.Name, err)
			}
			if err := do(conn, f, known); err != nil {
				return err
			}
		}
		return nil
	})
}

// change removes and adds elements of a set in one transaction.
func change(conn *nftables.Conn, f family, remove, add []nftables.SetElement) error {
	if len(remove) > 0 {
		if err := conn.SetDeleteElements(&f.set, remove); err != nil {
			return err
		}
	}
	if len(add) > 0 {
		if err := conn.SetAddElements(&f.set, add); err != nil {
			return err
		}
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("change the pods in nftables set %s: %w", f.set.Name, err)
	}
	return nil
}

// ensureHostTable makes the host's table, and leaves the pods in it that it has already.
func ensureHostTable() error {
	conn, err := nftables.New()
	if err != nil {
		return err
	}
	t := conn.AddTable(table())
	// Before the chains that masquerade: the first that changes a connection's source has decided.
	chain := conn.AddChain(&nftables.Chain{
		Name: "probes", Table: t, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPostrouting,
		Priority: nftables.ChainPriorityRef(prioritySource - 1),
	})
	conn.FlushChain(chain)
	for _, f := range families() {
		if err := conn.AddSet(&f.set, nil); err != nil {
			return err
		}
		conn.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: []expr.Any{
			meta(expr.MetaKeyNFPROTO), equal([]byte{f.nfproto}),
			meta(expr.MetaKeyL4PROTO), equal([]byte{unix.IPPROTO_TCP}),
			f.destination, &expr.Lookup{SourceRegister: register, SetName: f.set.Name},
			meta(expr.MetaKeySKUID), equal(number(0)),
			&expr.Immediate{Register: register, Data: f.probe.AsSlice()},
			&expr.NAT{Type: expr.NATTypeSourceNAT, Family: uint32(f.nfproto), RegAddrMin: register},
		}})
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("make nftables table %s on the host: %w", TableName, err)
	}
	return nil
}

// writeComment is what an element of a set says of its pod; readComment reads it.
func writeComment(p bpf.Pod) string { return strconv.FormatUint(p.Cookie, 10) + " " + p.UID }

func readComment(s string) (cookie uint64, uid string, err error) {
	number, uid, _ := strings.Cut(s, " ")
	cookie, err = strconv.ParseUint(number, 10, 64)
	return cookie, uid, err
}

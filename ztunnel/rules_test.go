package ztunnel_test

import (
	"context"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/internal/netns"
	"github.com/fairlead-mesh/fairlead/internal/zds"
)

// redirectByRules sets a pod up as Istio's agent does: NAT to the proxy's ports, and marks that bring the
// application's answers back to the proxy.
func redirectByRules(t *testing.T, ns *os.File) {
	t.Helper()
	conn, err := nftables.New(nftables.WithNetNSFd(int(ns.Fd())))
	if err != nil {
		t.Fatal(err)
	}
	table := conn.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "ambient"})
	chain := func(name string, kind nftables.ChainType, hook *nftables.ChainHook, priority *nftables.ChainPriority) func(...[]expr.Any) {
		c := conn.AddChain(&nftables.Chain{Name: name, Table: table, Type: kind, Hooknum: hook, Priority: priority})
		return func(parts ...[]expr.Any) {
			var all []expr.Any
			for _, p := range parts {
				all = append(all, p...)
			}
			conn.AddRule(&nftables.Rule{Table: table, Chain: c, Exprs: all})
		}
	}
	number := binaryutil.NativeEndian.PutUint32
	mark := func(op expr.CmpOp) []expr.Any {
		return []expr.Any{
			&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
			&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: number(0xfff), Xor: number(0)},
			&expr.Cmp{Op: op, Register: 1, Data: number(0x539)},
		}
	}
	tcp := []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
	}
	notPort := func(port uint16) []expr.Any {
		return []expr.Any{
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
			&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: binaryutil.BigEndian.PutUint16(port)},
		}
	}
	to := func(port uint16) []expr.Any {
		return []expr.Any{
			&expr.Immediate{Register: 1, Data: binaryutil.BigEndian.PutUint16(port)}, &expr.Redir{RegisterProtoMin: 1},
		}
	}
	lo := make([]byte, 16)
	copy(lo, "lo")
	notLo := []expr.Any{&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1}, &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: lo}}
	fromProxy := []expr.Any{&expr.Immediate{Register: 1, Data: number(0x111)}, &expr.Ct{Key: expr.CtKeyMARK, Register: 1, SourceRegister: true}}
	isFromProxy := []expr.Any{&expr.Ct{Key: expr.CtKeyMARK, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: number(0x111)}}
	notFromProxy := []expr.Any{&expr.Ct{Key: expr.CtKeyMARK, Register: 1}, &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: number(0x111)}}
	restore := []expr.Any{&expr.Ct{Key: expr.CtKeyMARK, Register: 1}, &expr.Meta{Key: expr.MetaKeyMARK, Register: 1, SourceRegister: true}}

	chain("mark_in", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityMangle)(mark(expr.CmpOpEq), fromProxy)
	chain("mark_out", nftables.ChainTypeRoute, nftables.ChainHookOutput, nftables.ChainPriorityMangle)(isFromProxy, restore)
	chain("nat_in", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest)(tcp, notPort(15008), mark(expr.CmpOpNeq), to(15006))
	chain("nat_out", nftables.ChainTypeNAT, nftables.ChainHookOutput, nftables.ChainPriorityNATDest)(tcp, notLo, notFromProxy, mark(expr.CmpOpNeq), to(15001))
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
	err = netns.Do(ns, func() error {
		for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
			rule := netlink.NewRule()
			rule.Family, rule.Mark, rule.Mask, rule.Table, rule.Priority = family, 0x111, ptr(uint32(0xfff)), 100, 1
			if err := netlink.RuleAdd(rule); err != nil {
				return err
			}
			everything := &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}
			if family == unix.AF_INET6 {
				everything = &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
			}
			if err := netlink.RouteAdd(&netlink.Route{LinkIndex: 1, Dst: everything, Table: 100, Type: unix.RTN_LOCAL, Scope: unix.RT_SCOPE_HOST}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func ptr[T any](v T) *T { return &v }

// TestUnderAnotherAgentsRules: where redirection rewrites addresses, the original destination comes from the kernel, the
// application still sees the client, and the proxy's own ports are refused.
func TestUnderAnotherAgentsRules(t *testing.T) {
	w := newWorld(t)
	client, server := w.pod("client", 2), w.pod("far", 4)
	for _, ns := range []*os.File{server.ns, w.fabric} {
		serveEcho(t, ns, 8080)
	}
	node1, node2 := w.node("node1", nil), w.node("node2", nil)
	w.push([]*mesh.Workload{client.workload("node1", nil), server.workload("node2", nil)}, nil, nil)
	for n, p := range map[*node]*pod{node1: client, node2: server} {
		redirectByRules(t, p.ns)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		w.must(n.agent.Add(ctx, zds.Workload{UID: p.name, Name: p.name, Namespace: "shop", ServiceAccount: p.name, Netns: p.ns}))
	}
	addr := func(ip netip.Addr) string { return netip.AddrPortFrom(ip, 8080).String() }
	for _, tc := range []struct {
		name       string
		from       *os.File
		to, answer string
		node       *node
		line       map[string]any
	}{
		{"tunnel", client.ns, addr(server.ip4), client.ip4.String(), node1, map[string]any{"path": "hbone", "dst.hbone_addr": addr(server.ip4)}},
		{"tunnel, IPv6", client.ns, addr(server.ip6), client.ip6.String(), node1, map[string]any{"path": "hbone", "dst.hbone_addr": addr(server.ip6)}},
		{"outside of the mesh", client.ns, fabric4 + ":8080", client.ip4.String(), node1, map[string]any{"path": "plain", "dst.addr": fabric4 + ":8080"}},
		{"from outside", w.fabric, addr(server.ip4), fabric4, node2, map[string]any{"path": "plain", "direction": "inbound", "dst.addr": addr(server.ip4)}},
		{"from outside, IPv6", w.fabric, addr(server.ip6), fabric6, node2, map[string]any{"path": "plain", "direction": "inbound", "dst.addr": addr(server.ip6)}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			answer, err := call(t, tc.from, tc.to)
			if want := tc.answer + "\nhello"; err != nil || answer != want {
				t.Errorf("answer %q, %v; want %q", answer, err, want)
			}
			tc.node.line(t, tc.line)
		})
	}
	for _, port := range []uint16{15001, 15006} {
		if answer, err := call(t, client.ns, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port).String()); err == nil {
			t.Errorf("the proxy's own port %d answered %q", port, answer)
		}
	}
	node1.line(t, map[string]any{"response_flags": "SELF_CALL"})
}

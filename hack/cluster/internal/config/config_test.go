package config

import (
	"encoding/json"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-mesh/fairlead/hack/cluster/internal/plan"
)

var paths = Paths{Bin: "/cache/bin", Run: "/state/run/lab", Runc: "/usr/sbin/runc"}

func layout(t *testing.T, family, cni string) plan.Plan {
	t.Helper()
	p, err := plan.New(plan.Spec{Name: "lab", Nodes: 2, IPFamily: family, ProxyMode: "iptables", CNI: cni, Cgroup: "v1"})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// conflist is what the CNI specification's reader sees of the network configuration.
type conflist struct {
	Plugins []struct {
		Type string
		IPAM struct {
			Routes []struct{ Dst netip.Prefix }
			Ranges [][]struct{ Subnet netip.Prefix }
		}
	}
}

func TestCNIConfigurationGivesEachFamilyARangeAndARoute(t *testing.T) {
	for _, c := range []struct {
		family, cni    string
		routes, ranges []string
	}{
		{"ipv4", "ptp", []string{"0.0.0.0/0"}, []string{"10.200.2.0/24"}},
		{"dual", "ptp", []string{"0.0.0.0/0", "::/0"}, []string{"10.200.2.0/24", "fd66:1a1e:0:102::/64"}},
		{"dual", "bridge", []string{"0.0.0.0/0", "::/0"}, []string{"10.200.2.0/24", "fd66:1a1e:0:102::/64"}},
	} {
		t.Run(c.family+" "+c.cni, func(t *testing.T) {
			p := layout(t, c.family, c.cni)
			files, err := NodeFiles(paths, p, p.Nodes[1])
			if err != nil {
				t.Fatal(err)
			}
			var got conflist
			if err := json.Unmarshal(files["/etc/cni/net.d/10-lab.conflist"], &got); err != nil {
				t.Fatalf("%v in %s", err, files["/etc/cni/net.d/10-lab.conflist"])
			}
			var routes, ranges []string
			for _, r := range got.Plugins[0].IPAM.Routes {
				routes = append(routes, r.Dst.String())
			}
			for _, r := range got.Plugins[0].IPAM.Ranges {
				ranges = append(ranges, r[0].Subnet.String())
			}
			if d := cmp.Diff([][]string{{c.cni}, c.routes, c.ranges}, [][]string{{got.Plugins[0].Type}, routes, ranges}); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestFilesNameWhatThePlanSays(t *testing.T) {
	p := layout(t, "dual", "ptp")
	files, err := NodeFiles(paths, p, p.Nodes[0])
	if err != nil {
		t.Fatal(err)
	}
	bootstrap, err := Bootstrap(paths, p)
	if err != nil {
		t.Fatal(err)
	}
	dns, err := CoreDNS(paths, p)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		in   []byte
		want []string
	}{
		{"containerd", files[containerdFile], []string{`BinaryName = "/usr/sbin/runc"`, "restrict_oom_score_adj = true"}},
		{"kubelet", files[kubeletFile], []string{`clusterDNS: ["10.96.0.10", "fd66:1a1e:0:fff0::a"]`, "/state/run/lab/pki/ca.crt"}},
		{"kube-proxy", files[kubeProxyFile], []string{"mode: iptables", `"10.200.0.0/16,fd66:1a1e:0:100::/56"`, "hostnameOverride: node1"}},
		{"hosts", files["/etc/hosts"], []string{"172.30.0.12 node2\n", "fd66:1a1e::b node1\n"}},
		{"bootstrap", bootstrap, []string{"name: node2\n", `podCIDRs: ["10.200.2.0/24", "fd66:1a1e:0:102::/64"]`}},
		{"coredns", dns, []string{`clusterIPs: ["10.96.0.10", "fd66:1a1e:0:fff0::a"]`, "RequireDualStack"}},
	} {
		for _, w := range c.want {
			if !strings.Contains(string(c.in), w) {
				t.Errorf("%s lacks %q:\n%s", c.name, w, c.in)
			}
		}
	}
}

func TestCommandLines(t *testing.T) {
	p := layout(t, "dual", "ptp")
	for _, c := range []struct {
		daemon Daemon
		want   string
	}{
		{APIServer(paths, p), "--service-cluster-ip-range=10.96.0.0/16,fd66:1a1e:0:fff0::/112"},
		{APIServer(paths, p), "--bind-address=::"},
		{APIServer(paths, layout(t, "ipv4", "ptp")), "--bind-address=0.0.0.0"},
		{NodeDaemons(paths, p.Nodes[1])[0], "--node-ip=172.30.0.12,fd66:1a1e::c"},
		{Controllers(paths)[1], "--kubeconfig=/state/run/lab/pki/scheduler.kubeconfig"},
	} {
		if !slices.Contains(c.daemon.Args, c.want) {
			t.Errorf("%s lacks %s: %q", c.daemon.Name, c.want, c.daemon.Args)
		}
	}
}

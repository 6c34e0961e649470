package redirect

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// String is a step as one reads it: conditions, an arrow, what is done.
func (s Step) String() string {
	var b strings.Builder
	add := func(wanted bool, format string, values ...any) {
		if wanted {
			fmt.Fprintf(&b, format+" ", values...)
		}
	}
	add(s.In != "", "in %s", s.In)
	add(s.Out != "", "out %s", s.Out)
	add(s.Source.IsValid(), "from %s", s.Source)
	add(s.Destination.IsValid(), "to %s", s.Destination)
	add(s.Protocol != 0, "%s", map[uint8]string{unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp"}[s.Protocol])
	add(s.Port != 0, "%d", s.Port)
	add(s.Opens, "opens")
	add(s.Proxy, "proxy")
	add(s.Answers, "answers")
	fmt.Fprintf(&b, "→ %s", []string{"accept", "drop", "reset", "redirect", "note", "mark"}[s.Do])
	add(s.To != 0, " %d", s.To)
	return strings.TrimSpace(b.String())
}

func TestExclusionsInChains(t *testing.T) {
	network := netip.MustParsePrefix
	for _, tc := range []struct {
		name    string
		exclude mesh.Exclusions
		in, out []string // after what every pod has
	}{
		{"nothing", mesh.Exclusions{}, []string{"tcp 15008 → accept", "tcp opens → redirect 15006"},
			[]string{"udp 53 → redirect 15053", "tcp 53 opens → redirect 15053", "tcp opens → redirect 15001"}},
		{"DNS", mesh.Exclusions{DNS: true}, []string{"tcp 15008 → accept", "tcp opens → redirect 15006"}, []string{"tcp opens → redirect 15001"}},
		{"all that arrives in clear", mesh.Exclusions{DNS: true, Inbound: true}, []string{"tcp 15008 → accept", "tcp → accept"}, []string{"tcp opens → redirect 15001"}},
		{"ports and networks", mesh.Exclusions{
			DNS: true, Interfaces: []string{"net1"},
			In:  mesh.Exclusion{Ports: []uint16{8080}},
			Out: mesh.Exclusion{Ports: []uint16{5432}, Networks: []netip.Prefix{network("10.0.0.0/8"), network("fd00::/8")}},
		},
			[]string{"in net1 → accept", "tcp 15008 → accept", "tcp 8080 → accept", "tcp opens → redirect 15006"},
			[]string{"out net1 → accept", "tcp 5432 → accept", "to 10.0.0.0/8 tcp → accept", "to fd00::/8 tcp → accept", "tcp opens → redirect 15001"}},
		{"all but some", mesh.Exclusions{
			In: mesh.Exclusion{Listed: true, CapturedPorts: []uint16{80}},
			Out: mesh.Exclusion{
				Ports: []uint16{22}, Networks: []netip.Prefix{network("10.0.0.0/8")},
				Listed: true, CapturedNetworks: []netip.Prefix{network("10.1.0.0/16")}, CapturedPorts: []uint16{53, 443},
			},
		},
			[]string{"tcp 15008 → accept", "tcp 80 opens → redirect 15006", "tcp → accept"},
			[]string{
				"udp 53 → redirect 15053", "tcp 22 → accept", "to 10.0.0.0/8 tcp → accept",
				"to 10.1.0.0/16 tcp 53 opens → redirect 15053", "to 10.1.0.0/16 tcp opens → redirect 15001",
				"tcp 53 opens → redirect 15053", "tcp 53 opens → redirect 15001", "tcp 443 opens → redirect 15001", "tcp → accept",
			}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			steps := map[string][]string{}
			for _, c := range podChains(PodConfig{Exclude: tc.exclude}) {
				for _, s := range c.Steps {
					steps[c.Name] = append(steps[c.Name], s.String())
				}
			}
			probes := []string{"in lo → accept", "from 169.254.7.127/32 → accept", "from fd16:9254:7127:1337:ffff:ffff:ffff:ffff/128 → accept"}
			own := []string{"proxy → accept", "out lo → accept"}
			want := map[string][]string{
				"note": {"in lo proxy → note"}, "answer": {"answers → mark"},
				"in": append(probes, tc.in...), "out": append(own, tc.out...),
				"last_in":  append([]string{"tcp 15006 → accept"}, replaced(append(probes, tc.in...), "reset")...),
				"last_out": replaced(append(own, tc.out...), "drop"),
			}
			if diff := cmp.Diff(want, steps); diff != "" {
				t.Errorf("steps (-want +got):\n%s", diff)
			}
		})
	}
}

// replaced are steps that do something else in place of redirecting; queries for names are not told apart there.
func replaced(steps []string, action string) (all []string) {
	for _, s := range steps {
		condition, redirected := strings.CutSuffix(s, " → redirect 15001")
		if !redirected {
			condition, redirected = strings.CutSuffix(s, " → redirect 15006")
		}
		switch {
		case redirected:
			all = append(all, condition+" → "+action)
		case !strings.HasSuffix(s, " 15053"):
			all = append(all, s)
		}
	}
	return all
}

package mesh

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseExclusions(t *testing.T) {
	const traffic = "traffic.sidecar.istio.io/"
	network := netip.MustParsePrefix
	for _, tc := range []struct {
		name           string
		pod, namespace map[string]string
		noDNS          bool
		want           Exclusions
		errs           []string
		text           string
	}{
		{name: "nothing"},
		{name: "DNS is off for the node", noDNS: true, want: Exclusions{DNS: true}, text: "DNS"},
		{name: "DNS on for the pod", noDNS: true, pod: map[string]string{DNSCaptureAnnotation: "true"}},
		{name: "DNS off for the pod", pod: map[string]string{DNSCaptureAnnotation: "false"}, want: Exclusions{DNS: true}, text: "DNS"},
		{name: "the pod's word wins", pod: map[string]string{DNSCaptureAnnotation: "true"}, namespace: map[string]string{DNSCaptureAnnotation: "false"}},
		{name: "the namespace's", namespace: map[string]string{BypassInboundAnnotation: "true"}, want: Exclusions{Inbound: true}, text: "inbound"},
		{name: "lists", pod: map[string]string{
			traffic + "excludeInboundPorts": "80, 443", traffic + "excludeOutboundPorts": "5432",
			traffic + "excludeOutboundIPRanges": "10.1.2.3/8,fd00::1/16", "ambient.fairlead.dev/excludeInboundIPRanges": "192.0.2.0/24",
			traffic + "excludeInterfaces": "net1,net2",
		}, want: Exclusions{
			In:         Exclusion{Ports: []uint16{80, 443}, Networks: []netip.Prefix{network("192.0.2.0/24")}},
			Out:        Exclusion{Ports: []uint16{5432}, Networks: []netip.Prefix{network("10.0.0.0/8"), network("fd00::/16")}},
			Interfaces: []string{"net1", "net2"},
		}, text: "inbound ports 80,443; inbound networks 192.0.2.0/24; outbound ports 5432; outbound networks 10.0.0.0/8,fd00::/16; interfaces net1,net2"},
		{name: "only these", pod: map[string]string{
			traffic + "includeInboundPorts": "8080", traffic + "includeOutboundIPRanges": "10.0.0.0/8", traffic + "includeOutboundPorts": "443",
		}, want: Exclusions{
			In:  Exclusion{Listed: true, CapturedPorts: []uint16{8080}},
			Out: Exclusion{Listed: true, CapturedPorts: []uint16{443}, CapturedNetworks: []netip.Prefix{network("10.0.0.0/8")}},
		}, text: "inbound except 8080; outbound except 443,10.0.0.0/8"},
		{name: "only none", pod: map[string]string{traffic + "includeInboundPorts": ""}, want: Exclusions{In: Exclusion{Listed: true, CapturedPorts: nil}}, text: "inbound"},
		{name: "all", pod: map[string]string{
			traffic + "includeInboundPorts": "*", traffic + "includeOutboundIPRanges": "*", traffic + "includeOutboundPorts": "443", traffic + "excludeInboundPorts": "",
		}},
		{name: "what cannot be understood leaves nothing out", pod: map[string]string{
			DNSCaptureAnnotation: "no", BypassInboundAnnotation: "yes", traffic + "excludeInboundPorts": "80,http", traffic + "includeInboundPorts": "0",
			traffic + "excludeOutboundPorts": "65536", traffic + "excludeOutboundIPRanges": "10.0.0.1", traffic + "includeOutboundIPRanges": "::ffff:10.0.0.0/104",
			traffic + "excludeInterfaces": "../net", traffic + "includeOutboundPorts": "-1", "ambient.fairlead.dev/excludeInboundIPRanges": "all",
		}, namespace: map[string]string{DNSCaptureAnnotation: "false"}, errs: []string{
			"bypass-inbound-capture", "dns-capture", "excludeInboundPorts", "includeInboundPorts", "excludeInboundIPRanges",
			"excludeOutboundPorts", "includeOutboundPorts", "excludeOutboundIPRanges", "includeOutboundIPRanges", "excludeInterfaces",
		}},
		{name: "too many", pod: map[string]string{traffic + "excludeOutboundPorts": strings.Repeat("1,", 64) + "1"}, errs: []string{"excludeOutboundPorts"}},
		{name: "loopback", pod: map[string]string{traffic + "excludeInterfaces": "lo"}, errs: []string{"excludeInterfaces"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, errs := ParseExclusions(tc.pod, tc.namespace, !tc.noDNS)
			if diff := cmp.Diff(tc.want, got, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
				t.Errorf("exclusions (-want +got):\n%s", diff)
			}
			if len(errs) != len(tc.errs) {
				t.Fatalf("errors %v, want %d", errs, len(tc.errs))
			}
			for i, part := range tc.errs {
				if !strings.Contains(errs[i].Error(), part) {
					t.Errorf("error %v, want one about %s", errs[i], part)
				}
			}
			if got.String() != tc.text || got.IsZero() != (tc.text == "") {
				t.Errorf("text %q, want %q; zero: %v", got.String(), tc.text, got.IsZero())
			}
		})
	}
	for _, name := range ExclusionAnnotations() {
		if _, errs := ParseExclusions(map[string]string{name: "?"}, nil, true); len(errs) != 1 {
			t.Errorf("%s is not read", name)
		}
	}
}

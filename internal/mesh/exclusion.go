package mesh

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Exclusions are what of a pod's traffic its owner leaves out of redirection. The zero value leaves out nothing.
type Exclusions struct {
	// DNS: the pod's queries go straight to its resolvers.
	DNS bool
	// Inbound: what arrives in clear goes straight to the application, whatever its port. Tunnels are still taken.
	Inbound bool
	// In is what arrives in clear, by the pod's port and the client's address; Out is what the pod opens, by the
	// destination's port and address.
	In, Out Exclusion
	// Interfaces are the names of the pod's interfaces whose traffic is left out.
	Interfaces []string
}

// Exclusion leaves connections of one direction out.
type Exclusion struct {
	// Ports and Networks are left out. They come before what follows.
	Ports    []uint16
	Networks []netip.Prefix
	// Listed: all is left out, but for CapturedPorts and CapturedNetworks.
	Listed           bool
	CapturedPorts    []uint16
	CapturedNetworks []netip.Prefix
}

// IsZero tells whether nothing is left out.
func (x Exclusions) IsZero() bool {
	return !x.DNS && !x.Inbound && x.In.isZero() && x.Out.isZero() && len(x.Interfaces) == 0
}

func (x Exclusion) isZero() bool { return len(x.Ports) == 0 && len(x.Networks) == 0 && !x.Listed }

// Annotations of pods and namespaces that say what to leave out. They are Istio's, but for the one that Istio lacks.
const (
	BypassInboundAnnotation    = "ambient.istio.io/bypass-inbound-capture"
	DNSCaptureAnnotation       = "ambient.istio.io/dns-capture"
	excludeInPortsAnnotation   = "traffic.sidecar.istio.io/excludeInboundPorts"
	includeInPortsAnnotation   = "traffic.sidecar.istio.io/includeInboundPorts"
	excludeOutPortsAnnotation  = "traffic.sidecar.istio.io/excludeOutboundPorts"
	includeOutPortsAnnotation  = "traffic.sidecar.istio.io/includeOutboundPorts"
	excludeOutRangesAnnotation = "traffic.sidecar.istio.io/excludeOutboundIPRanges"
	includeOutRangesAnnotation = "traffic.sidecar.istio.io/includeOutboundIPRanges"
	excludeInRangesAnnotation  = "ambient.fairlead.dev/excludeInboundIPRanges"
	interfacesAnnotation       = "traffic.sidecar.istio.io/excludeInterfaces"
)

// ExclusionAnnotations are the annotations that ParseExclusions reads.
func ExclusionAnnotations() []string {
	return []string{
		BypassInboundAnnotation, DNSCaptureAnnotation, excludeInPortsAnnotation, includeInPortsAnnotation,
		excludeOutPortsAnnotation, includeOutPortsAnnotation, excludeOutRangesAnnotation, includeOutRangesAnnotation,
		excludeInRangesAnnotation, interfacesAnnotation,
	}
}

// maxExclusions bounds each list of an annotation.
const maxExclusions = 64

// ParseExclusions reads what a pod's annotations leave out, or its namespace's where the pod does not have the same
// annotation. captureDNS holds where neither says anything of DNS. The errors name annotations that cannot be
// understood: those leave nothing out.
func ParseExclusions(pod, namespace map[string]string, captureDNS bool) (Exclusions, []error) {
	x := Exclusions{DNS: !captureDNS}
	var errs []error
	read := func(name string, set func(text string) error) {
		text, ok := pod[name]
		if !ok {
			if text, ok = namespace[name]; !ok {
				return
			}
		}
		if err := set(strings.TrimSpace(text)); err != nil {
			errs = append(errs, fmt.Errorf("annotation %s: %w", name, err))
		}
	}
	read(BypassInboundAnnotation, setBool(&x.Inbound))
	read(DNSCaptureAnnotation, func(text string) error {
		capture := captureDNS
		err := setBool(&capture)(text)
		x.DNS = !capture
		return err
	})
	read(excludeInPortsAnnotation, setList(&x.In.Ports, parsePort))
	read(includeInPortsAnnotation, setOnly(&x.In.Listed, &x.In.CapturedPorts, parsePort))
	read(excludeInRangesAnnotation, setList(&x.In.Networks, parseNetwork))
	read(excludeOutPortsAnnotation, setList(&x.Out.Ports, parsePort))
	read(includeOutPortsAnnotation, setList(&x.Out.CapturedPorts, parsePort))
	read(excludeOutRangesAnnotation, setList(&x.Out.Networks, parseNetwork))
	read(includeOutRangesAnnotation, setOnly(&x.Out.Listed, &x.Out.CapturedNetworks, parseNetwork))
	read(interfacesAnnotation, setList(&x.Interfaces, parseInterface))
	if !x.Out.Listed {
		x.Out.CapturedPorts = nil // all are
	}
	return x, errs
}

func setBool(to *bool) func(string) error {
	return func(text string) error {
		switch text {
		case "true", "false":
			*to = text == "true"
			return nil
		}
		return fmt.Errorf("%.64q is neither true nor false", text)
	}
}

// setList reads elements with commas between.
func setList[T any](to *[]T, parse func(string) (T, error)) func(string) error {
	return func(text string) error {
		if text == "" {
			return nil
		}
		elements := strings.Split(text, ",")
		if len(elements) > maxExclusions {
			return fmt.Errorf("%d elements are too many, %d may be", len(elements), maxExclusions)
		}
		list := make([]T, 0, len(elements))
		for _, element := range elements {
			value, err := parse(strings.TrimSpace(element))
			if err != nil {
				return err
			}
			list = append(list, value)
		}
		*to = list
		return nil
	}
}

// setOnly reads a list of all that is captured, where "*" stands for everything.
func setOnly[T any](listed *bool, to *[]T, parse func(string) (T, error)) func(string) error {
	return func(text string) error {
		if text == "*" {
			return nil
		}
		if err := setList(to, parse)(text); err != nil {
			return err
		}
		*listed = true
		return nil
	}
}

func parsePort(text string) (uint16, error) {
	port, err := strconv.ParseUint(text, 10, 16)
	if err != nil || port == 0 {
		return 0, fmt.Errorf("%.64q is not a port", text)
	}
	return uint16(port), nil
}

func parseNetwork(text string) (netip.Prefix, error) {
	network, err := netip.ParsePrefix(text)
	if err != nil || network.Addr().Is4In6() {
		return netip.Prefix{}, fmt.Errorf("%.64q is not a network, as 10.0.0.0/8 is", text)
	}
	return network.Masked(), nil
}

// interfaceName is what the kernel lets an interface be called, and less.
var interfaceName = regexp.MustCompile(`^[A-Za-z0-9_.@-]{1,15}$`)

func parseInterface(text string) (string, error) {
	if !interfaceName.MatchString(text) || slices.Contains([]string{".", ".."}, text) {
		return "", fmt.Errorf("%.64q is not the name of an interface", text)
	}
	if text == "lo" {
		return "", errors.New("lo is never redirected")
	}
	return text, nil
}

// String is for people: what is left out, and nothing else.
func (x Exclusions) String() string {
	var parts []string
	add := func(name string, values ...string) {
		if len(values) > 0 {
			parts = append(parts, name+" "+strings.Join(values, ","))
		}
	}
	if x.DNS {
		parts = append(parts, "DNS")
	}
	if x.Inbound {
		parts = append(parts, "inbound")
	}
	for _, d := range []struct {
		name string
		Exclusion
	}{{"inbound", x.In}, {"outbound", x.Out}} {
		add(d.name+" ports", texts(d.Ports)...)
		add(d.name+" networks", texts(d.Networks)...)
		if d.Listed {
			captured := append(texts(d.CapturedPorts), texts(d.CapturedNetworks)...)
			add(d.name+" except", captured...)
			if len(captured) == 0 {
				parts = append(parts, d.name)
			}
		}
	}
	add("interfaces", x.Interfaces...)
	return strings.Join(parts, "; ")
}

func texts[T any](values []T) []string {
	out := make([]string, 0, len(values))
	for _, v := range values {
		out = append(out, fmt.Sprint(v))
	}
	return out
}

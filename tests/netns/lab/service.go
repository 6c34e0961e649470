package lab

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// ServiceSpec says what Service to make. It has an address of each family.
type ServiceSpec struct {
	Namespace, Name string
	// Selector chooses the pods of the namespace that back it.
	Selector            map[string]string
	Labels, Annotations map[string]string
	// Ports are "http" (ServicePortHTTP to PortHTTP) and "tcp" (PortTCP) if none are given.
	Ports []ServicePort
}

// ServicePort is one port of a Service.
type ServicePort struct {
	Name         string
	Port, Target int32
	// AppProtocol may be empty.
	AppProtocol string
}

// ServicePortHTTP is the Service's port for PortHTTP of its pods.
const ServicePortHTTP = 80

// Service is a Service with its EndpointSlices, which follow the pods.
type Service struct {
	ServiceSpec
	Addrs []netip.Addr
}

// Service writes a service; the same name again replaces it and keeps its addresses.
func (w *World) Service(spec ServiceSpec) (*Service, error) {
	if spec.Ports == nil {
		spec.Ports = []ServicePort{
			{Name: "http", Port: ServicePortHTTP, Target: PortHTTP, AppProtocol: "http"},
			{Name: "tcp", Port: PortTCP, Target: PortTCP},
		}
	}
	w.mu.Lock()
	var s *Service
	for _, known := range w.services {
		if known.Namespace == spec.Namespace && known.Name == spec.Name {
			s = known
		}
	}
	if s == nil {
		n := len(w.services) + 10
		s = &Service{Addrs: []netip.Addr{
			hostOf(netip.MustParsePrefix("10.96.0.0/16"), n), hostOf(netip.MustParsePrefix("fd00:96::/64"), n),
		}}
		w.services = append(w.services, s)
	}
	s.ServiceSpec = spec
	w.mu.Unlock()
	if err := w.objects.put("v1", "Service", s.object()); err != nil {
		return nil, err
	}
	return s, w.publishEndpoints()
}

func (s *Service) object() *corev1.Service {
	dual := corev1.IPFamilyPolicyPreferDualStack
	obj := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: s.Name, Labels: s.Labels, Annotations: s.Annotations},
		Spec: corev1.ServiceSpec{
			Selector: s.Selector, Type: corev1.ServiceTypeClusterIP,
			IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol}, IPFamilyPolicy: &dual,
			ClusterIP: s.Addrs[0].String(), ClusterIPs: []string{s.Addrs[0].String(), s.Addrs[1].String()},
		},
	}
	for _, p := range s.Ports {
		port := corev1.ServicePort{
			Name: p.Name, Protocol: corev1.ProtocolTCP, Port: p.Port, TargetPort: intstr.FromInt32(p.Target),
		}
		if p.AppProtocol != "" {
			port.AppProtocol = &p.AppProtocol
		}
		obj.Spec.Ports = append(obj.Spec.Ports, port)
	}
	return obj
}

// Addr is the service's address and port; v6 chooses the family.
func (s *Service) Addr(port uint16, v6 bool) string {
	i := 0
	if v6 {
		i = 1
	}
	return netip.AddrPortFrom(s.Addrs[i], port).String()
}

// publishEndpoints writes the EndpointSlices of all services, as the endpoint slice controller would.
func (w *World) publishEndpoints() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	var errs []error
	for _, s := range w.services {
		for family, addressType := range []discoveryv1.AddressType{discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6} {
			errs = append(errs, w.objects.put("discovery.k8s.io/v1", "EndpointSlice", s.slice(w.pods, family, addressType)))
		}
	}
	return errors.Join(errs...)
}

func (s *Service) slice(pods []*Pod, family int, addressType discoveryv1.AddressType) *discoveryv1.EndpointSlice {
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: s.Namespace, Name: fmt.Sprintf("%s-%s", s.Name, strings.ToLower(string(addressType))),
			Labels: map[string]string{
				discoveryv1.LabelServiceName: s.Name, discoveryv1.LabelManagedBy: "endpointslice-controller.k8s.io",
			},
		},
		AddressType: addressType,
	}
	for _, p := range s.Ports {
		protocol := corev1.ProtocolTCP
		slice.Ports = append(slice.Ports, discoveryv1.EndpointPort{Name: &p.Name, Port: &p.Target, Protocol: &protocol})
	}
	ready, no := true, false
	for _, p := range pods {
		if p.Namespace != s.Namespace || !selects(s.Selector, p.Labels) {
			continue
		}
		slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{
			Addresses:  []string{p.Addrs[family].String()},
			Conditions: discoveryv1.EndpointConditions{Ready: &ready, Serving: &ready, Terminating: &no},
			NodeName:   &p.node.Name,
			TargetRef:  &corev1.ObjectReference{Kind: "Pod", Namespace: p.Namespace, Name: p.Name},
		})
	}
	return slice
}

func selects(selector, labels map[string]string) bool {
	for k, v := range selector {
		if labels[k] != v {
			return false
		}
	}
	return len(selector) > 0
}

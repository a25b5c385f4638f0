#include <regex>
#include <map>
#include <vector>
#include <string>
#include <algorithm>
#include <iostream>
#include <functional>
#include <variant>
#include <tuple>
template<int N> struct S { std::map<std::string, std::vector<std::variant<int, double, std::string, S<N-1>*>>> m; std::regex r{"a+(b|c)*"}; template<class F> auto go(F f) { std::vector<std::pair<std::string,int>> v; for (auto& [k, x] : m) for (auto& y : x) std::visit([&](auto& z) { using T = std::decay_t<decltype(z)>; if constexpr (std::is_same_v<T, std::string>) { if (std::regex_match(z, r)) v.emplace_back(z, N); } else if constexpr (std::is_pointer_v<T>) { if constexpr (N > 1) { auto w = z->go(f); v.insert(v.end(), w.begin(), w.end()); } } else v.emplace_back(std::to_string(z), f(z)); }, y); std::sort(v.begin(), v.end(), [](auto& a, auto& b) { return std::tie(a.second, a.first) < std::tie(b.second, b.first); }); return v; } };
template<> struct S<0> { template<class F> auto go(F) { return std::vector<std::pair<std::string,int>>{}; } };
int main() { S<60> s; std::cout << s.go([](auto x) { return (int)x; }).size(); }
